"""Whether a data set is still what `prepare` wrote."""

import argparse
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError

from declip_jax.data import image, records
from declip_jax.data.input_files import InputError
from declip_jax.data.parallel import Progress, Tick, parallel
from declip_jax.prepare.manifest import manifest_path, read_manifests, split_size
from declip_jax.prepare.shards import sha256

SHOWN = 5  # problems of one shard that are named


def verify(args: argparse.Namespace) -> int:
    """Compares the files with the manifest and prints all problems; returns 1 if there are any.

    Raises InputError if there is no such data set or split.
    """
    directory = Path(args.directory)
    try:
        manifests = read_manifests(directory)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory}: a manifest is damaged ({error!r})") from None
    if args.split is not None:
        manifests = {name: found for name, found in manifests.items() if name == args.split}
    if not manifests:
        path = manifest_path(directory, args.split or "<split>")
        raise InputError(f"{path}: no such file; prepare writes it when a split is complete")

    jobs = [(directory, split, shard) for split, m in manifests.items() for shard in m["shards"]]
    progress = Progress(0, sum(shard["records"] for *_, shard in jobs))
    found = {split: check_metadata(directory, split, m) for split, m in manifests.items()}
    check = functools.partial(check_shard, args.decode)
    for (_, split, _), problems in parallel(check, jobs, args.workers, progress):
        found[split] += problems

    print(f"{'split':<12}{'shards':>8}{'images':>14}{'MB':>12}  result")
    for split, manifest in manifests.items():
        size = split_size(manifest)
        result = f"{len(found[split])} problems" if found[split] else "as written"
        print(
            f"{split:<12}{len(size.shard_lengths):>8,}{sum(size.shard_lengths):>14,}"
            f"{size.num_bytes / 1e6:>12,.1f}  {result}"
        )
        if any("sha256" not in shard for shard in manifest["shards"]):
            print("  written before there were checksums: its records were read instead")
    for split, problems in found.items():
        for problem in sorted(problems):
            print(f"{split}: {problem}")
    return int(any(found.values()))


def check_metadata(directory: Path, split: str, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with what TFDS reads, or is not the manifest's."""
    from tensorflow_datasets import builder_from_directory

    if (directory / f"{split}.incomplete").exists():
        return [f"{split}.incomplete is there: give prepare's command again to finish"]
    try:
        info = builder_from_directory(directory).info
    except Exception as error:  # of several kinds
        return [f"dataset_info.json or features.json is missing or damaged ({error!r:.200})"]
    if split not in info.splits:
        return [f"dataset_info.json has the splits {sorted(info.splits)} only"]
    settings, size = manifest["settings"], split_size(manifest)
    labels = info.features["label"].names if "label" in info.features else []
    has_synthetic = settings.get("synthetic") is not None
    there = info.splits[split]
    expected = {shard["name"] for shard in manifest["shards"]}
    present = {path.name for path in directory.glob(f"{info.name}-{split}.array_record-*")}
    return [
        f"{what} {is_!r:.200}, the manifest {should!r:.200}"
        for what, is_, should in (
            ("dataset_info.json has the name", info.name, settings["name"]),
            ("dataset_info.json has shards of", there.shard_lengths, list(size.shard_lengths)),
            ("dataset_info.json has bytes", there.num_bytes, size.num_bytes),
            ("features.json has classes", labels, settings["class_names"]),
            ("features.json has synthetic", "synthetic" in info.features, has_synthetic),
            ("the folder has more shards,", sorted(present - expected), []),
        )
        if is_ != should
    ]


def check_shard(decode: bool, job: tuple[Path, str, Mapping[str, Any]], tick: Tick) -> list[str]:
    directory, _, shard = job
    problems = list(_problems(decode, directory / shard["name"], shard, tick))
    shown = [f"{shard['name']}: {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        shown.append(f"{shard['name']}: and {len(problems) - SHOWN:,} more")
    return shown


def _problems(decode: bool, path: Path, shard: Mapping[str, Any], tick: Tick) -> Iterator[str]:
    if not path.is_file():
        yield "missing"
        return
    if "sha256" in shard:
        size = path.stat().st_size
        if size != shard["bytes"]:
            yield f"{size:,} bytes, the manifest {shard['bytes']:,}"
            return
        if sha256(path) != shard["sha256"]:
            yield "its SHA-256 is not the manifest's"
    reader = ArrayRecordReader(str(path))
    count = reader.num_records()  # 0 of what is no array_record file, or has lost its end
    if count != shard["records"]:
        yield f"{count:,} records, the manifest {shard['records']:,}"
    for number in range(count):
        tick()
        try:
            record = records.deserialize(reader.read([number])[0])
            if decode:
                image.decode(record["image"])
        except (RuntimeError, ValueError, IndexError, DecodeError) as error:
            yield f"record {number} cannot be read ({error!s:.200})"
