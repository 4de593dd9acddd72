"""What there is to write: images that a file lists, or the records of a source."""

import argparse
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from declip_jax.data.input_files import (
    Files,
    InputError,
    Item,
    Refusal,
    index_csv,
    index_imagefolder,
    index_jsonl,
    refusal,
)
from declip_jax.data.parallel import Progress, Tick, parallel
from declip_jax.data.records import BadRecord, Record
from declip_jax.data.sources import Columns, Source, open_source, paths
from declip_jax.data.sources.base import first_record
from declip_jax.data.sources.part import Part
from declip_jax.data.sources.tar import key_hash
from declip_jax.files import replacing


class Reader(Protocol):
    """Reads the records of items; goes to worker processes, so it can be pickled."""

    def name(self, item: Any) -> str:
        """For messages, and for the list of what was refused."""
        ...

    def read(self, item: Any) -> Record:
        """Raises BadRecord if this one cannot be used, though others may be."""
        ...


class Input(NamedTuple):
    items: Sequence[Any]  # for the reader, in the order of the result
    reader: Reader
    refused: Sequence[Refusal]  # before any record is read
    class_names: Sequence[str]  # by label; empty without classes
    has_synthetic: bool
    digest: str  # changes with the names and captions, or with the files that have them
    left_out: Mapping[str, int] = {}  # by reason, how many the source leaves out unlisted


def read_input(args: argparse.Namespace) -> Input:
    """Lists or opens what the flags name; raises InputError if it cannot be used."""
    return read_source(args) if "source" in args else read_listing(args)


# Images that a file lists ------------------------------------------------------------------------


class ListedReader(NamedTuple):
    files: Files

    def name(self, item: Item) -> str:
        return item.key

    def read(self, item: Item) -> Record:
        record = {"image": self.files.read(item.key), "captions": item.captions, "key": item.key}
        if item.label is not None:
            record["label"] = item.label
        if item.synthetic:
            record["synthetic"] = item.synthetic
        return record


def read_listing(args: argparse.Namespace) -> Input:
    files = Files(args.images, args.subfolder)
    if args.format == "csv":
        columns = args.image_column, args.caption_column, args.synthetic
        index = index_csv(files, args.captions, *columns)
    elif args.format == "jsonl":
        fields = args.image_field, args.caption_field, args.synthetic
        index = index_jsonl(files, args.captions, *fields)
    else:
        index = index_imagefolder(files, args.template, args.classes, args.synthetic or ())
    digest = _sha256([item.key, item.captions, item.label, *item.synthetic] for item in index.items)
    has_synthetic = args.synthetic is not None
    reader = ListedReader(files)
    return Input(index.items, reader, index.refused, index.class_names, has_synthetic, digest)


# Sources ----------------------------------------------------------------------------------------


class SourceReader(NamedTuple):
    source: Source
    has_synthetic: bool

    def name(self, item: int) -> str:
        return self.source.locate(item)

    def read(self, item: int) -> Record:
        found = self.source[item]
        record = {name: found[name] for name in ("image", "captions", "key")}
        if self.source.class_names:
            record["label"] = int(found["label"])
        if self.has_synthetic:
            if not found.get("synthetic"):
                raise BadRecord("no synthetic caption", "it is missing or empty")
            record["synthetic"] = found["synthetic"]
        return record


def read_source(args: argparse.Namespace) -> Input:
    columns = Columns(
        image=args.image_column or "",
        captions=tuple(args.caption_column or ()),
        synthetic=tuple(args.synthetic or ()),
        key=args.key_column or "",
        label=args.label_column or "",
    )
    try:
        source = open_source(args.source, args.source_split, columns, args.cache)
        # Changes when a shard does, as far as size and time tell: to read the contents would take
        # as long as the conversion.
        versions = paths.versions([*source.files, *filter(None, [args.captions])])
        digest = _sha256([[source.layout(), source.class_names, versions]])
    except ValueError as error:
        message = str(error).replace("config.data.index_cache", "--cache")
        for field in columns.as_dict():
            flag = f"--{field.removesuffix('s')}-column"
            message = message.replace(f"config.data.columns.{field}", flag)
        raise InputError(f"--source {args.source}: {message}") from None
    check_format(args, source)
    has_synthetic = bool(columns.synthetic or (first_record(source) or {}).get("synthetic"))
    if args.format == "captions":  # which are to come, in place of those that there are
        reader, has_synthetic = SourceReader(source, has_synthetic=False), True
    else:
        reader = SourceReader(source, has_synthetic)
    refused, left_out = [], {}
    # Of what an index of tar shards leaves out, it has the number and the first names.
    for reason, (count, names) in source.refused.items():
        refused += [refusal(name, BadRecord(reason, f"one of {count:,}")) for name in names]
        left_out[reason] = count - len(names)
    items, names = range(len(source)), source.class_names
    return Input(items, reader, refused, names, has_synthetic, digest, left_out)


def _sha256(values: Iterable[Any]) -> str:
    """Of the values' JSON, one after the other; manifests keep it."""
    hashed = hashlib.sha256()
    for value in values:
        hashed.update(json.dumps(value).encode())
    return hashed.hexdigest()


def check_format(args: argparse.Namespace, source: Source) -> None:
    """Raises InputError if the command is the one for sources of another kind."""
    kind = type(source.source if isinstance(source, Part) else source).__name__
    commands = {"WebDataset": "webdataset", "Parquet": "parquet", "TfdsSource": "tfds"}
    command = commands.get(kind, "array_record")
    if args.format not in (command, "captions"):
        raise InputError(f"--source {args.source}: for this the command is {command}")


# Duplicates -------------------------------------------------------------------------------------


class WithoutDuplicates:
    """Refuses the records whose numbers are in a file; see `find_duplicates`.

    It can be pickled; each process opens the file itself.
    """

    def __init__(self, reader: SourceReader, path: Path):
        self._reader, self._path = reader, path

    def __reduce__(self):
        return WithoutDuplicates, (self._reader, self._path)

    @functools.cached_property
    def _duplicates(self) -> np.ndarray:
        return np.load(self._path, mmap_mode="r")

    def name(self, item: int) -> str:
        return self._reader.name(item)

    def read(self, item: int) -> Record:
        place = np.searchsorted(self._duplicates, item)
        if place < len(self._duplicates) and self._duplicates[place] == item:
            raise BadRecord("duplicate key", "an earlier record has the same")
        return self._reader.read(item)


def find_duplicates(args: argparse.Namespace, reader: SourceReader, path: Path) -> None:
    """Writes the sorted numbers of all records whose key an earlier one has, unless it is done.

    Keys are compared by 64 bits of a hash: among 100 million different ones, a pair passes for the
    same with a probability of 0.03 %. It takes about 30 bytes of memory for each record.
    """
    if path.exists():
        return
    source, unreadable = reader.source, []
    if hasattr(source, "key_hashes") and not args.key_column:  # those of its own keys
        hashes = source.key_hashes()
    else:
        hashes = np.zeros(len(source), np.uint64)
        jobs = [range(n, min(n + 1000, len(source))) for n in range(0, len(source), 1000)]
        progress = Progress(0, len(source), "keys")
        work = functools.partial(hash_keys, source)
        for job, (part, bad) in parallel(work, jobs, args.workers, progress):
            hashes[job.start : job.stop] = part
            unreadable += bad
    order = np.argsort(hashes, kind="stable")  # the first with a key stays the first
    hashes = hashes[order]
    duplicates = order[1:][hashes[1:] == hashes[:-1]]
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, np.setdiff1d(duplicates, unreadable))


def hash_keys(source: Source, job: range, tick: Tick) -> tuple[np.ndarray, list[int]]:
    """A hash of each key, uint64 [len(job)], and the numbers of those that cannot be read."""
    hashes, unreadable = np.zeros(len(job), np.uint64), []
    for place, number in enumerate(job):
        tick()
        try:
            hashes[place] = key_hash(source[number]["key"])
        except BadRecord:  # whatever hash it has, it is no duplicate
            unreadable.append(number)
    return hashes, unreadable
