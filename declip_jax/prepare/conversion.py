"""What a run does, from beginning to end."""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from declip_jax.data import records
from declip_jax.data.input_files import InputError, Refusal
from declip_jax.data.parallel import Progress, parallel
from declip_jax.files import TEMPORARY, publish, replacing, write_text
from declip_jax.prepare import captions
from declip_jax.prepare.inputs import Input, Reader, WithoutDuplicates, find_duplicates, read_input
from declip_jax.prepare.manifest import (
    check_other_splits,
    check_settings,
    manifest_path,
    read_manifests,
    report,
    settings_of,
    split_size,
)
from declip_jax.prepare.shards import Job, WriteShard, counts_path


def prepare(args: argparse.Namespace) -> None:
    """Writes one split, or what is missing of it.

    The finished output folder holds the shards, TFDS' metadata and, for each split, its manifest
    prepare-<split>.json and refused-<split>.jsonl. Until then the shards and what is known about
    each are in <split>.incomplete. Raises InputError, which says what to change, if it cannot be
    done as asked.
    """
    found = read_input(args)
    count = len(found.items)
    if not count:
        reasons = Counter(entry["reason"] for entry in found.refused)
        raise no_records(args, reasons, next(iter(found.refused), None))
    # By default at least a few, so that several workers have something to do, and at most 512,
    # because a reader keeps all of them open.
    args.shards = min(args.shards or min(512, max(8, -(-count // 1000))), count)
    settings = settings_of(args, found)

    output = Path(os.path.abspath(args.output))  # worker processes may be elsewhere
    work = output / f"{args.split}.incomplete"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise InputError(f"--output {output}: cannot write there ({error})") from None
    with locked(output):
        check_other_splits(output, settings)
        if manifest_path(output, args.split).exists():
            advice = "Choose another --output or --split."
            check_settings(manifest_path(output, args.split), settings, advice)
            if work.exists():
                finish(output, work, settings)
            print(f"already complete: {output}")
            print(report(read_manifests(output)[args.split]))
            return

        settings_path = work / "settings.json"
        if settings_path.exists():
            advice = f"Continue with these, or delete {work} to begin again."
            check_settings(settings_path, settings, advice)
        work.mkdir(exist_ok=True)
        for unfinished in work.glob(f"*{TEMPORARY}"):
            unfinished.unlink()
        write_text(settings_path, json.dumps({"settings": settings}))

        refused = output / f"refused-{args.split}.jsonl"
        try:
            with replacing(refused, scratch=work) as listed:
                manifest = convert(args, found, settings, work, listed)
        except InputError:
            dear = (f"{args.name}-{args.split}.*.json", "duplicates.npy", "captions.sqlite")
            if not any(any(work.glob(pattern)) for pattern in dear):
                shutil.rmtree(work, ignore_errors=True)  # not in the way of other settings
            raise
        for shard in manifest["shards"]:
            if (work / shard["name"]).exists():  # else an interrupted run has moved it already
                publish(work / shard["name"], output / shard["name"])
        with replacing(manifest_path(output, args.split), scratch=work) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")
        finish(output, work, settings)
    print(report(manifest))
    print(f"written to {output}; refused-{args.split}.jsonl there lists what was refused")


def convert(
    args: argparse.Namespace, found: Input, settings: Mapping[str, Any], work: Path, listed: Path
) -> dict[str, Any]:
    """Writes the shards that `work` lacks and a list of what was refused; returns the manifest."""
    reader, refused, table = found.reader, found.refused, None
    if args.deduplicate:
        find_duplicates(args, reader, work / "duplicates.npy")
        reader = WithoutDuplicates(reader, work / "duplicates.npy")
    if args.format == "captions" and args.captions:
        table = captions.Table.write(args, work)
        reader, refused = captions.Joined(reader, table), [*refused, *table.refused()]

    count = len(found.items)
    shards = range(args.shards)
    paths = [work / records.shard_name(args.name, args.split, n, args.shards) for n in shards]
    missing = [
        (path, found.items[count * shard // args.shards : count * (shard + 1) // args.shards])
        for shard, path in enumerate(paths)
        if not counts_path(path).exists()
    ]
    write_shards(args, reader, missing, total=count)

    manifest = {"settings": settings, "shards": [], "captions": 0, "record_bytes": 0}
    reasons, first = Counter(found.left_out), None
    with open(listed, "w") as lines:
        for entry in itertools.chain(refused, read_counts(paths, manifest)):
            reasons[entry["reason"]] += 1
            first = first or entry
            lines.write(json.dumps(entry) + "\n")
    if not any(shard["records"] for shard in manifest["shards"]):
        shutil.rmtree(work)
        raise no_records(args, reasons, first)
    manifest["refused"] = {reason: number for reason, number in reasons.most_common() if number}
    if table is not None:
        manifest["unused_keys"] = table.unused_keys()
    return manifest


def write_shards(
    args: argparse.Namespace, reader: Reader, missing: Sequence[Job], total: int
) -> None:
    done = total - sum(len(items) for _, items in missing)
    if done:
        print(f"continuing after {done:,} of {total:,} images", file=sys.stderr)
    write = WriteShard(args, reader)
    if args.format == "captions" and args.model:
        captions.write_shards(write, missing, Progress(done, total))
    elif args.beam is not None:
        from declip_jax.prepare import beam

        beam.write_shards(write, missing, args.beam)
    else:
        for _ in parallel(write, missing, args.workers, Progress(done, total)):
            pass


def read_counts(shards: Iterable[Path], manifest: dict[str, Any]) -> Iterator[Refusal]:
    """Adds what is known of each shard to the manifest, and yields what was refused."""
    for path in shards:
        counts = json.loads(counts_path(path).read_text())
        known = {name: counts[name] for name in ("records", "bytes", "sha256")}
        manifest["shards"].append({"name": path.name, **known})
        manifest["captions"] += counts["captions"]
        manifest["record_bytes"] += counts["record_bytes"]
        yield from counts["refused"]


def finish(output: Path, work: Path, settings: Mapping[str, Any]) -> None:
    """The last steps, which an interrupted run repeats: TFDS' metadata, and tidying up."""
    sizes = {split: split_size(manifest) for split, manifest in read_manifests(output).items()}
    synthetic = settings["synthetic"] is not None
    records.write_metadata(
        output, settings["name"], sizes, settings["class_names"], synthetic, scratch=work
    )
    shutil.rmtree(work)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the output folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"--output {folder}: another run is writing there; wait for it") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


def no_records(
    args: argparse.Namespace, reasons: Mapping[str, int], first: Refusal | None
) -> InputError:
    return InputError(
        f"no record to write from {args.source if 'source' in args else args.images}"
        + (f"; refused: {dict(reasons)}, the first: {first}" if first else ": nothing is listed")
    )
