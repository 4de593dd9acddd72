"""Writing shards."""

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from declip_jax.data import records
from declip_jax.data.input_files import InputError, refusal
from declip_jax.data.parallel import Tick
from declip_jax.files import replacing, write_text
from declip_jax.prepare.filters import Loaded, load
from declip_jax.prepare.inputs import Reader

Job = tuple[Path, Sequence[Any]]  # a shard, and the items to write into it


class WriteShard(NamedTuple):
    """Writes a shard from its items; goes to worker processes and Beam's."""

    args: argparse.Namespace
    reader: Reader

    def __call__(self, job: Job, tick: Tick) -> None:
        path, items = job
        write_shard(path, self.load(items, tick))

    def load(self, items: Sequence[Any], tick: Tick) -> Iterator[Loaded]:
        for item in items:
            tick()
            yield load(self.args, self.reader, item)


def write_shard(path: Path, loaded: Iterable[Loaded]) -> None:
    """Writes a shard, then what is known about it."""
    counts = {"records": 0, "captions": 0, "record_bytes": 0, "refused": []}
    with replacing(path) as temporary:
        # One record a group for random access; images are compressed already.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for record, refused in loaded:
            counts["refused"] += [refusal(name, error) for name, error in refused]
            if record is None:
                continue
            serialized = records.serialize(record)
            with _telling_of_full_disks():
                writer.write(serialized)
            counts["records"] += 1
            counts["captions"] += len(record["captions"])
            counts["record_bytes"] += len(serialized)
        with _telling_of_full_disks():
            writer.close()
        counts |= {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
    write_text(counts_path(path), json.dumps(counts))


@contextlib.contextmanager
def _telling_of_full_disks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # array_record's
        raise InputError(f"{error}; once there is room, the same command continues") from None


def counts_path(shard: Path) -> Path:
    """Exists once the shard is finished."""
    return shard.with_name(shard.name + ".json")


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
