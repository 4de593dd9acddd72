"""Synthetic captions for the records of a source: from a model, or from a file by key."""

import argparse
import collections
import functools
import itertools
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from declip_jax.data import image
from declip_jax.data.input_files import (
    MAX_CAPTION,
    InputError,
    Refusal,
    Refuse,
    check_columns,
    csv_table,
    is_utf8,
    jsonl_rows,
    refusal,
)
from declip_jax.data.parallel import Progress
from declip_jax.data.records import BadRecord, Record
from declip_jax.files import replacing
from declip_jax.prepare.filters import Loaded
from declip_jax.prepare.inputs import Reader
from declip_jax.prepare.shards import Job, WriteShard, write_shard

# From a model -----------------------------------------------------------------------------------

Captioner = Callable[[list[np.ndarray]], list[str]]


def write_shards(write: WriteShard, missing: Sequence[Job], progress: Progress) -> None:
    """Writes shards in this process, which loads --model, with threads that decode for it."""
    from declip_jax.prepare.captioner import Captioner as Model  # slow to import, and an extra

    args = write.args
    try:
        captioner = Model(args.model, args.device, args.max_new_tokens, args.prompt)
    except ValueError as error:
        raise InputError(f"--model {args.model}: {error}") from None
    with futures.ThreadPoolExecutor(args.workers) as pool:
        for path, items in missing:
            write_shard(path, _captioned(captioner, pool, write, items, progress))


def _captioned(
    captioner: Captioner,
    pool: futures.Executor,
    write: WriteShard,
    items: Sequence[Any],
    progress: Progress,
) -> Iterator[Loaded]:
    """What `write.load` yields, with captions; the batches of a shard depend on it alone."""

    def load(item: Any) -> tuple[Any, Loaded, np.ndarray | None]:
        ((record, refused),) = write.load([item], tick=lambda: None)
        try:
            pixels = None if record is None else image.decode(record["image"])
            return item, (record, refused), pixels
        except ValueError as error:  # --no-decode has not found it
            damage = BadRecord("unreadable image", str(error))
            return item, (None, [*refused, (write.reader.name(item), damage)]), None

    items, loading = iter(items), collections.deque()
    while True:
        # The next batch is read while the model works on this one.
        for item in itertools.islice(items, 2 * write.args.batch_size - len(loading)):
            loading.append(pool.submit(load, item))
        batch = []
        while loading and len(batch) < write.args.batch_size:
            batch.append(loading.popleft().result())
            progress.tick()
        if not batch:
            return
        images = [pixels for *_, pixels in batch if pixels is not None]
        texts = iter(captioner(images) if images else ())
        for item, (record, refused), pixels in batch:
            if pixels is not None:
                record["synthetic"] = [next(texts).strip()]
                if not record["synthetic"][0]:
                    nothing = BadRecord("no synthetic caption", "the model wrote nothing")
                    record, refused = None, [*refused, (write.reader.name(item), nothing)]
            yield record, refused


# From a file ------------------------------------------------------------------------------------


class Table:
    """The captions of a file by key, on disk, where all workers read it.

    Beside it is an array that tells, by the row with a key's first caption, whether any record has
    that key. It can be pickled; each process opens the files itself.
    """

    def __init__(self, path: Path):
        self.path, self._used_path = path, path.with_suffix(".used")

    def __reduce__(self):
        return Table, (self.path,)

    @functools.cached_property
    def _database(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)

    @functools.cached_property
    def _used(self) -> np.ndarray:
        return np.memmap(self._used_path, bool, "r+")

    @classmethod
    def write(cls, args: argparse.Namespace, work: Path) -> "Table":
        """Reads --from, unless an interrupted run has done so; raises InputError if it cannot."""
        table = cls(work / "captions.sqlite")
        if table.path.exists():
            return table
        refused = []

        def refuse(line: str, reason: str, detail: str) -> None:
            refused.append(refusal(line, BadRecord(reason, detail)))

        def rows() -> Iterator[tuple[str, str]]:
            for line, key, caption in read_rows(args, refuse):
                if not is_utf8(key + caption):
                    refuse(line, "not UTF-8", f"key {key!r}")
                elif not key or not caption.strip():
                    refuse(line, "empty caption" if key else "bad row", f"key {key!r}")
                elif max(len(key), len(caption)) > MAX_CAPTION:
                    refuse(line, "caption too long", f"at most {MAX_CAPTION:,} characters")
                else:
                    yield key, caption

        with replacing(table.path) as temporary:
            with sqlite3.connect(temporary) as database:  # in one transaction
                database.execute("PRAGMA journal_mode = OFF")  # it is thrown away if it fails
                database.execute("PRAGMA synchronous = OFF")
                database.execute("CREATE TABLE captions (key TEXT, caption TEXT)")
                database.execute("CREATE TABLE refused (key TEXT, reason TEXT, detail TEXT)")
                database.executemany("INSERT INTO captions VALUES (?, ?)", rows())
                database.executemany("INSERT INTO refused VALUES (:key, :reason, :detail)", refused)
                database.execute("CREATE INDEX by_key ON captions (key)")
                (count,) = database.execute("SELECT COUNT(*) FROM captions").fetchone()
            database.close()
            np.zeros(count, bool).tofile(table._used_path)
        return table

    def captions(self, key: str) -> list[str]:
        """In the order of the file; none if it lacks the key."""
        found = self._database.execute(
            "SELECT rowid, caption FROM captions WHERE key = ? ORDER BY rowid", (key,)
        ).fetchall()
        if found:
            self._used[found[0][0] - 1] = True
        return [caption for _, caption in found]

    def refused(self) -> list[Refusal]:
        rows = self._database.execute("SELECT key, reason, detail FROM refused")
        return [dict(zip(("key", "reason", "detail"), row, strict=True)) for row in rows]

    def unused_keys(self) -> int:
        (keys,) = self._database.execute("SELECT COUNT(DISTINCT key) FROM captions").fetchone()
        return keys - int(self._used.sum()) if keys else 0


def read_rows(args: argparse.Namespace, refuse: Refuse) -> Iterator[tuple[str, str, str]]:
    """Yields which row it is, its key and its caption."""
    path, name = Path(args.captions), f"--from {args.captions}"
    if path.suffix == ".parquet":
        yield from _parquet_rows(args, name, refuse)
        return
    # What is not UTF-8 becomes surrogates, which are refused row by row.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        columns = {"--key-field": args.key_field, "--caption-field": args.caption_field}
        if path.suffix == ".csv":
            header, rows = csv_table(stream, name, refuse)
            check_columns(name, columns, header)
        else:
            rows = jsonl_rows(stream, name, tuple(columns.values()), refuse)
        for line, row in rows:
            yield line, row[args.key_field], row[args.caption_field]


def _parquet_rows(
    args: argparse.Namespace, name: str, refuse: Refuse
) -> Iterator[tuple[str, str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(args.captions)
        columns = {"--key-field": args.key_field, "--caption-field": args.caption_field}
        check_columns(name, columns, file.schema_arrow.names)
        for column in columns.values():
            kind = file.schema_arrow.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise InputError(f"{name}: column {column!r} holds {kind}, expected texts")
        number = 0
        for batch in file.iter_batches(columns=list(columns.values())):
            # As bytes, for Parquet's texts may be no UTF-8.
            keys, captions = (
                batch.column(column).cast(pyarrow.large_binary()).to_pylist()
                for column in columns.values()
            )
            for key, caption in zip(keys, captions, strict=True):
                number += 1
                if key is None or caption is None:
                    refuse(f"row {number}", "bad row", "no key or no caption")
                    continue
                texts = (text.decode(errors="surrogateescape") for text in (key, caption))
                yield f"row {number}", *texts
    except pyarrow.ArrowException as error:
        raise InputError(f"{name}: not a whole Parquet file ({error})") from None


class Joined(NamedTuple):
    """The records of a reader with the captions that a table has for their keys."""

    reader: Reader
    table: Table

    def name(self, item: Any) -> str:
        return self.reader.name(item)

    def read(self, item: Any) -> Record:
        record = self.reader.read(item)
        record["synthetic"] = self.table.captions(record["key"])
        if not record["synthetic"]:
            raise BadRecord("no synthetic caption", f"--from has no key {record['key']!r}")
        return record
