"""Turns a raw download into a training set: array_record shards in a TFDS directory.

    python -m declip_jax.prepare csv --images flickr8k.zip --subfolder images \\
        --captions captions.csv --output /data/flickr8k --split train

What belongs to which shard follows from the input alone, and a shard has its name only when it is
whole. So a run that was stopped continues with the shards that are missing, and its result has the
same bytes as that of an uninterrupted run, for any number of workers.
"""

import argparse
import contextlib
import fcntl
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from declip_jax.data import image, records
from declip_jax.data.raw import (
    Files,
    Index,
    InputError,
    Item,
    Refused,
    index_csv,
    index_imagefolder,
    index_jsonl,
)
from declip_jax.data.text import read_wordnet


def prepare(args: argparse.Namespace) -> None:
    """Writes one split, or what is missing of it.

    The finished output folder holds the shards, TFDS' metadata and, for each split,
    prepare-<split>.json (settings and counts) and refused-<split>.jsonl. Until then the shards and
    what is known about each are in <split>.incomplete.

    Raises:
      InputError: it cannot be done as asked; the message says what to change.
    """
    files = Files(args.images, args.subfolder)
    index = read_index(args, files)
    count = len(index.items)
    if not count:
        raise no_records(args, index.refused)
    # By default at least a few, so that several workers have something to do, and at most 512,
    # because a reader keeps all of them open.
    args.shards = min(args.shards or min(512, max(8, -(-count // 1000))), count)
    settings = settings_of(args, index)

    output = Path(args.output)
    work = output / f"{args.split}.incomplete"
    summary_path = output / f"prepare-{args.split}.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise InputError(f"--output {output}: cannot write there ({error})") from None
    with locked(output):
        check_other_splits(output, settings)
        if summary_path.exists():
            check_settings(summary_path, settings, "Choose another --output or --split.")
            if work.exists():
                finish(output, work, settings)
            print(f"already complete: {output}")
            print(report(json.loads(summary_path.read_text())))
            return

        settings_path = work / "settings.json"
        if settings_path.exists():
            advice = f"Continue with these, or delete {work} to begin again."
            check_settings(settings_path, settings, advice)
        work.mkdir(exist_ok=True)
        write_text(settings_path, json.dumps({"settings": settings}))

        paths = [
            work / records.shard_name(args.name, args.split, shard, args.shards)
            for shard in range(args.shards)
        ]
        bounds = [count * shard // args.shards for shard in range(args.shards + 1)]
        missing = {
            path: index.items[first:last]
            for path, first, last in zip(paths, bounds, bounds[1:], strict=False)
            if not counts_path(path).exists()
        }
        write_shards(args, files, missing, total=count)

        counts = [json.loads(counts_path(path).read_text()) for path in paths]
        refused = [*index.refused, *(entry for shard in counts for entry in shard["refused"])]
        if not any(shard["records"] for shard in counts):
            shutil.rmtree(work)
            raise no_records(args, refused)
        for path in paths:
            if path.exists():  # else an interrupted run has moved it already
                os.replace(path, output / path.name)
        summary = {
            "settings": settings,
            "shard_lengths": [shard["records"] for shard in counts],
            "captions": sum(shard["captions"] for shard in counts),
            "bytes": sum(shard["bytes"] for shard in counts),
            "refused": dict(Counter(entry["reason"] for entry in refused).most_common()),
        }
        lines = "".join(json.dumps(entry) + "\n" for entry in refused)
        write_text(output / f"refused-{args.split}.jsonl", lines)
        write_text(summary_path, json.dumps(summary, indent=1) + "\n")
        finish(output, work, settings)
    print(report(summary))
    print(f"written to {output}; refused-{args.split}.jsonl there lists what was refused")


def finish(output: Path, work: Path, settings: Mapping[str, Any]) -> None:
    """The last steps, which an interrupted run repeats: TFDS' metadata, and tidying up."""
    sizes = {
        split: records.SplitSize(summary["shard_lengths"], summary["bytes"])
        for split, summary in read_summaries(output).items()
    }
    synthetic = settings["synthetic"] is not None
    records.write_metadata(output, settings["name"], sizes, settings["class_names"], synthetic)
    shutil.rmtree(work)


def read_index(args: argparse.Namespace, files: Files) -> Index:
    if args.format == "csv":
        return index_csv(
            files, args.captions, args.image_column, args.caption_column, args.synthetic
        )
    if args.format == "jsonl":
        return index_jsonl(
            files, args.captions, args.image_field, args.caption_field, args.synthetic
        )
    return index_imagefolder(files, args.template, args.classes, args.synthetic or ())


def no_records(args: argparse.Namespace, refused: Sequence[Mapping[str, str]]) -> InputError:
    counts = dict(Counter(entry["reason"] for entry in refused))
    return InputError(
        f"no record to write from {args.images}"
        + (f"; refused: {counts}, the first: {refused[0]}" if refused else ": nothing is listed")
    )


def report(summary: Mapping[str, Any]) -> str:
    settings, refused = summary["settings"], summary["refused"]
    lines = [
        f"{settings['split']}: kept {sum(summary['shard_lengths']):,} images with "
        f"{summary['captions']:,} captions, {summary['bytes'] / 1e6:,.1f} MB in "
        f"{settings['shards']} shards"
    ]
    lines += [f"  refused  {reason:<20}{count:>10,}" for reason, count in refused.items()]
    return "\n".join(lines if refused else [*lines, "  refused  nothing"])


# What is there already --------------------------------------------------------------------------


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


def settings_of(args: argparse.Namespace, index: Index) -> dict[str, Any]:
    """Everything that decides about the bytes of the result."""
    digest = hashlib.sha256()
    for item in index.items:
        digest.update(json.dumps([item.key, item.captions, item.label, *item.synthetic]).encode())
    settings = vars(args) | {
        "images": os.path.abspath(args.images),
        "class_names": index.class_names,
        "input_digest": digest.hexdigest(),  # of all names and captions, whichever file has them
    }
    indifferent = ("output", "workers", "captions", "classes")
    return {key: value for key, value in settings.items() if key not in indifferent}


def check_settings(path: Path, settings: Mapping[str, Any], advice: str) -> None:
    """Raises InputError unless the settings kept in `path` are these."""
    before = json.loads(path.read_text())["settings"]
    different = [
        f"{key} was {before.get(key)!r:.80}, now {settings.get(key)!r:.80}"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]
    if different:
        raise InputError(f"{path.parent} has other settings: {'; '.join(different)}. {advice}")


def check_other_splits(output: Path, settings: Mapping[str, Any]) -> None:
    """Raises InputError unless this split and those already there can be one data set."""
    summaries = read_summaries(output)
    if not summaries and (output / "dataset_info.json").exists():
        raise InputError(f"--output {output}: holds a data set from elsewhere; choose another")
    summaries.pop(settings["split"], None)
    for split, summary in summaries.items():
        for key, flag in (("name", "--name"), ("class_names", "--classes")):
            there = summary["settings"][key]
            if there != settings[key]:
                raise InputError(
                    f"--output {output}: all splits of a data set have the same {key}, but split "
                    f"{split!r} has {there!r:.200} and this one {settings[key]!r:.200}; "
                    f"change {flag} or --output"
                )
        # Splits written before there were synthetic captions have no such setting.
        has, other_has = (s.get("synthetic") is not None for s in (settings, summary["settings"]))
        if has != other_has:
            raise InputError(
                f"--output {output}: either all splits of a data set have synthetic captions or "
                f"none, but split {split!r} has {'some' if other_has else 'none'} and this one "
                f"{'some' if has else 'none'}; add or drop --synthetic-…, or change --output"
            )


def read_summaries(output: Path) -> dict[str, dict[str, Any]]:
    """Split -> summary, of the splits that are complete."""
    summaries = [json.loads(path.read_text()) for path in sorted(output.glob("prepare-*.json"))]
    return {summary["settings"]["split"]: summary for summary in summaries}


# Shards -----------------------------------------------------------------------------------------


def write_shard(
    args: argparse.Namespace,
    files: Files,
    path: Path,
    items: Sequence[Item],
    tick: Callable[[], None],
) -> None:
    """Writes a shard, then what is known about it; calls `tick` for every item."""
    counts = {"records": 0, "captions": 0, "bytes": 0, "refused": []}
    temporary = path.with_name(path.name + ".tmp")
    # One record a group for random access; images are compressed already.
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    try:
        for item in items:
            tick()
            try:
                encoded = check_image(args, files.read(item.key))
            except Refused as error:
                counts["refused"].append(error.entry(item.key))
                continue
            record = {"image": encoded, "captions": item.captions, "key": item.key}
            if item.label is not None:
                record["label"] = item.label
            if item.synthetic:
                record["synthetic"] = item.synthetic
            serialised = records.serialise(record)
            writer.write(serialised)
            counts["records"] += 1
            counts["captions"] += len(item.captions)
            counts["bytes"] += len(serialised)
        writer.close()
    except RuntimeError as error:  # array_record's
        raise InputError(f"{error}; once there is room, the same command continues") from None
    publish(temporary, path)
    write_text(counts_path(path), json.dumps(counts))


def counts_path(shard: Path) -> Path:
    """Exists once the shard is finished."""
    return shard.with_name(shard.name + ".json")


def check_image(args: argparse.Namespace, encoded: bytes) -> bytes:
    """The image as it came, or re-encoded if --short-side shrinks it; raises Refused."""
    try:
        height, width = image.header_size(encoded)
        if height * width > args.max_pixels:
            raise Refused("too many pixels", f"{width} x {height}, at most {args.max_pixels:,}")
        if args.short_side is None or min(height, width) <= args.short_side:
            if not args.no_decode:
                image.decode(encoded)
            return encoded
        scale = args.short_side / min(height, width)
        size = round(width * scale), round(height * scale)
        pixels = cv2.resize(image.decode(encoded), size, interpolation=cv2.INTER_AREA)
        return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="420")
    except (ValueError, struct.error, cv2.error) as error:
        raise Refused("unreadable image", str(error)) from None


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished file its name: even after a power failure it is there whole, or not."""
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Progress:
    """How far the run is: on one line of a terminal, elsewhere a line now and then."""

    def __init__(self, done: int, total: int):
        self.first, self.done, self.total = done, done, total
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def tick(self) -> None:
        self.show(self.done + 1)

    def show(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self.shown >= (0.5 if self.terminal else 30):
            self.shown = now
            line = tqdm.format_meter(
                done,
                self.total,
                now - self.start,
                initial=self.first,
                unit=" images",
                bar_format="{n:,} of {total:,} images, {rate_fmt}, {remaining} left",
            )
            print(line, end="   \r" if self.terminal else "\n", file=sys.stderr, flush=True)


def write_shards(
    args: argparse.Namespace, files: Files, shards: Mapping[Path, Sequence[Item]], total: int
) -> None:
    """Writes the shards, {path: items}, with up to --workers processes."""
    done = total - sum(map(len, shards.values()))
    progress = Progress(done, total)
    if done:
        print(f"continuing after {done:,} of {total:,} images", file=sys.stderr)
    workers = min(args.workers, len(shards))
    if workers <= 1:
        for path, items in shards.items():
            write_shard(args, files, path, items, progress.tick)
        return
    # Spawned, because array_record and OpenCV have threads, which forking does not survive.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", done), context.Event()
    with futures.ProcessPoolExecutor(
        workers, context, initializer=start_worker, initargs=(args, counter, stop)
    ) as pool:
        try:
            pending = {pool.submit(work_on_shard, path, items) for path, items in shards.items()}
            while pending:
                finished, pending = futures.wait(pending, 0.5, futures.FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress.show(counter.value)
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed, perhaps because memory ran out; the same command "
                "continues, and may have fewer --workers"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class Stopped(Exception):
    """Ends a worker when another one failed or the user interrupts."""


def start_worker(args: argparse.Namespace, counter, stop) -> None:
    def tick() -> None:
        if stop.is_set():
            raise Stopped
        with counter.get_lock():
            counter.value += 1

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process gets it too, and sets `stop`
    threading.Thread(target=follow_parent, daemon=True).start()
    files = Files(args.images, args.subfolder)
    global _write_shard
    _write_shard = functools.partial(write_shard, args, files, tick=tick)


_write_shard: Callable[..., None]  # in a worker process


def work_on_shard(path: Path, items: Sequence[Item]) -> None:
    _write_shard(path=path, items=items)


# Synonyms ---------------------------------------------------------------------------------------


def write_synonyms(args: argparse.Namespace) -> None:
    """Writes the file for `config.data.synonyms`; the same input always gives the same bytes."""
    synonyms = read_wordnet(args.wordnet)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_bytes(gzip.compress(json.dumps(synonyms).encode(), mtime=0))
    publish(temporary, output)
    print(f"{output}: {len(synonyms):,} words with synonyms")


# The command line -------------------------------------------------------------------------------


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--images", required=True, metavar="FOLDER_OR_ZIP", help="where the images are")
    add("--subfolder", default="", metavar="NAME", help="folder in --images to begin in")
    add("--output", required=True, metavar="DIR", help="the data set; a second split joins it")
    add("--split", default="train", help="the split to write (default: train)")
    add("--name", help="of the data set (default: the last part of --output)")
    add(
        "--short-side",
        type=positive,
        metavar="N",
        help="shrink larger images to N pixels and encode them as JPEG, quality 95 "
        "(default: all images keep their bytes)",
    )
    add(
        "--max-pixels",
        type=positive,
        default=image.MAX_PIXELS,
        metavar="N",
        help="refuse larger images, unseen but for their header (default, and most: %(default)s)",
    )
    add("--no-decode", action="store_true", help="do not decode each image to prove it whole")
    add(
        "--shards", type=positive, metavar="N", help="files to write (default: by number of images)"
    )
    add(
        "--workers",
        type=positive,
        default=os.cpu_count(),
        metavar="N",
        help="processes; any number gives the same result (default: %(default)s)",
    )

    parser = argparse.ArgumentParser(
        prog="python -m declip_jax.prepare",
        description="Turns images with captions into a training set. A run that was stopped "
        "continues when the same command is given again.",
    )
    formats = parser.add_subparsers(
        dest="format", required=True, metavar="csv|imagefolder|jsonl|synonyms"
    )

    def add_format(
        name: str, description: str, example: str, parents: Sequence = (common,)
    ) -> Callable[..., Any]:
        return formats.add_parser(
            name,
            parents=parents,
            help=description,
            description=description,
            epilog=f"example:\n  python -m declip_jax.prepare {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).add_argument

    synthetic = "captions that a model wrote, for methods that read them (default: none)"
    captions = {"required": True, "metavar": "FILE", "help": "a path, or else a file in the zip"}
    add = add_format(
        "csv",
        "A CSV file with a row for each caption.",
        "--images flickr8k.zip --subfolder images \\\n"
        "      --captions captions.csv --output /data/flickr8k --split train",
    )
    add("--captions", **captions)
    add("--image-column", default="image", metavar="NAME", help="(default: image)")
    add("--caption-column", default="caption", metavar="NAME", help="(default: caption)")
    add("--synthetic-column", dest="synthetic", metavar="NAME", help=synthetic)

    add = add_format(
        "imagefolder",
        "A folder of images for each class, and captions by template.",
        "--images cifar10.zip --subfolder test \\\n"
        '      --template "a photo of a {}." --template "a picture of a {}." \\\n'
        "      --output /data/cifar10 --split test",
    )
    add(
        "--template",
        action="append",
        help="caption with {} for the name of the class; repeatable (default: a photo of a {}.)",
    )
    add(
        "--synthetic-template",
        dest="synthetic",
        action="append",
        metavar="TEMPLATE",
        help=f"the same for {synthetic}",
    )
    add(
        "--classes",
        metavar="FILE",
        help="readable names of the classes: lines of folder<TAB or =>name, or of names alone in "
        "the folders' sorted order (default: the folders' names, with spaces for underscores)",
    )

    add = add_format(
        "jsonl",
        "A file with a JSON object a line, one for each image.",
        "--images yfcc15m/ --captions yfcc15m.jsonl \\\n"
        "      --output /data/yfcc15m --split train --short-side 288",
    )
    add("--captions", **captions)
    add("--image-field", default="filename", metavar="NAME", help="(default: filename)")
    add("--caption-field", default="caption", metavar="NAME", help="(default: caption)")
    add("--synthetic-field", dest="synthetic", metavar="NAME", help=synthetic)

    add = add_format(
        "synonyms",
        "Synonyms of WordNet, for the augmentation of captions.",
        "--wordnet /usr/share/wordnet --output synonyms.json.gz",
        parents=(),
    )
    add("--wordnet", required=True, metavar="DIR", help="has data.noun, data.verb, data.adj, …")
    add("--output", required=True, metavar="FILE", help="for config.data.synonyms")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    args.name = args.name or Path(args.output).resolve().name
    for flag in ("name", "split"):
        value = getattr(args, flag)
        if not re.fullmatch(r"[A-Za-z]\w*", value, re.ASCII) or value == "all":
            raise InputError(
                f"--{flag} {value!r}: must be letters, digits and underscores, and not 'all'"
            )
    if args.max_pixels > image.MAX_PIXELS:
        raise InputError(f"--max-pixels {args.max_pixels}: at most {image.MAX_PIXELS}")
    if args.format == "imagefolder":
        args.template = args.template or ["a photo of a {}."]
        for template in (*args.template, *(args.synthetic or ())):
            if "{}" not in template:
                raise InputError(f"template {template!r} has no {{}} for the name of the class")


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    try:
        if args.format == "synonyms":
            write_synonyms(args)
        else:
            check_arguments(args)
            prepare(args)
    except KeyboardInterrupt:
        print("\nstopped; finished shards are kept, the same command continues", file=sys.stderr)
        return 130
    except (InputError, OSError, zipfile.BadZipFile, zlib.error) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
