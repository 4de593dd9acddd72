"""Parquet files as Hugging Face writes them: encoded images and their captions in columns."""

import functools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pyarrow import types

from declip_jax.data.options import Columns
from declip_jax.data.records import BadRecord
from declip_jax.data.sources import paths
from declip_jax.data.sources.base import Source, find
from declip_jax.data.sources.fields import checked_record, choose

# Where `Columns` names nothing, the first of these that is there and fits.
_CAPTIONS = ("captions", "caption", "texts", "text", "TEXT", "txt", "sentences")

CACHE_BYTES = 512 << 20  # of row groups, in each process, though at least two of them
MAX_GROUP_BYTES = 2 << 30  # of the columns that are read; as much as Arrow holds in one piece

_Place = tuple[fsspec.AbstractFileSystem, str]  # a file, as `paths.file_system` tells it


class Parquet(Source):
    """The rows of Parquet files, one file after the other.

    They are read by whole row groups, as large as their writer chose, and only the columns that
    are needed. The last row groups are kept; no file stays open.

    Args:
      pattern: a file, a folder or a pattern, see `paths.expand`.
      columns: the columns to read.
        image: binary, or a struct with the field bytes; "" is "image", or else the only such one.
        captions, synthetic: strings, or lists of them.
        key: strings or integers; "" is the field path of the image's struct, or where that is
          missing the name of the file and the row in it, as in "train-00000:17".
        label: integers, for which Hugging Face's notes in the file have the class names; "" is
          "label" if they do.

    Raises:
      ValueError: no such files, damaged ones, columns that are missing or of other types, row
        groups that are too large, or no rows at all.
    """

    def __init__(self, pattern: str, columns: Columns):
        self.name = pattern
        self.files = paths.expand(pattern, ".parquet")
        self._folder = os.path.commonprefix(self.files).rfind("/") + 1  # in letters of each path
        # From this thread, for fsspec makes a file system of its own for each.
        places = [paths.file_system(path) for path in self.files]
        _, schema = _footer(self.files[0], places[0])
        self._columns = _resolve(columns, schema, self.files[0])
        self.class_names = _class_names(schema, self._columns.label)
        if self._columns.label and not self.class_names:
            raise ValueError(
                f"config.data.columns.label: {self.files[0]} does not tell the names of the "
                f"classes in {self._columns.label!r}, as the datasets library notes them for a "
                "ClassLabel. Save the files with them, or leave the label out."
            )
        c = self._columns
        self._needed = list(filter(None, (c.image, *c.captions, *c.synthetic, c.key, c.label)))
        with ThreadPoolExecutor(paths.REQUESTS) as pool:
            files = list(pool.map(self._row_groups, self.files, places))
        # Of the row groups of all files that have rows: [groups], each.
        file = np.repeat(np.arange(len(files), dtype=np.uint32), [len(groups) for groups in files])
        number, rows, size = np.concatenate(files).T
        used = rows > 0
        if not used.any():
            raise ValueError(f"{pattern!r}: these Parquet files have no rows.")
        self._file, self._number, rows = file[used], number[used].astype(np.uint32), rows[used]
        self._length = int(rows.sum())
        self.blocks = np.cumsum(rows) - rows
        together = CACHE_BYTES // (2 * max(int(size.max()), 1))
        self.blocks_together = min(max(together, 1), len(rows))
        self._kept = _Kept(2 * self.blocks_together)

    def _row_groups(self, path: str, place: _Place) -> np.ndarray:
        """Checks a file's columns; number, rows and bytes of each row group: int64 [groups, 3]."""
        metadata, schema = _footer(path, place)
        _resolve(self._columns, schema, path)
        if _class_names(schema, self._columns.label) != self.class_names:
            raise ValueError(f"{path} and {self.files[0]} have different classes.")
        prefixes = tuple(f"{name}." for name in self._needed)
        leaves = [
            leaf
            for leaf in range(metadata.num_columns)
            if f"{metadata.schema.column(leaf).path}.".startswith(prefixes)
        ]
        groups = np.zeros((metadata.num_row_groups, 3), np.int64)
        for number, group in enumerate(groups):
            stored = metadata.row_group(number)
            size = sum(stored.column(leaf).total_uncompressed_size for leaf in leaves)
            if size > MAX_GROUP_BYTES:
                raise ValueError(
                    f"{path}: row group {number} has {size:,} bytes in the columns to read, which "
                    f"are read at once, at most {MAX_GROUP_BYTES:,}. Write the file anew with a "
                    "smaller row_group_size, such as 100 rows."
                )
            group[:] = number, stored.num_rows, size
        return groups

    def __len__(self) -> int:
        return self._length

    def layout(self) -> list[Any]:
        return [*super().layout(), self.blocks.tolist(), self.blocks_together]

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = self._columns
        block, row = find(self.blocks, index)
        table = self._kept.get(block, self._read)
        if isinstance(table, str):
            raise BadRecord("unreadable record", table)
        values = {name: table[name][row] for name in self._needed}
        image, keys = values[columns.image], []
        if types.is_struct(image.type):
            if any(field.name == "path" and _is_key(field.type) for field in image.type):
                keys = _texts(image["path"])
            image = image["bytes"]
        if not image.is_valid:
            raise BadRecord("no image", "only its path is there" if keys else "it is null")
        if columns.key:
            keys = _texts(values[columns.key])
        synthetic = [text for name in columns.synthetic for text in _texts(values[name])]
        record = checked_record(
            image.as_buffer(),
            [text for name in columns.captions for text in _texts(values[name])],
            next(filter(len, keys), None) or self._name(block, index).encode(),
            synthetic if columns.synthetic else None,
        )
        if columns.label:
            label = values[columns.label].as_py()
            if label is None or not 0 <= label < len(self.class_names):
                raise BadRecord("no label", f"{label} of {len(self.class_names)} classes")
            record["label"] = label
        return record

    def locate(self, index: int) -> str:
        block, row = find(self.blocks, index)
        return f"{self.files[self._file[block]]}: row group {self._number[block]}, row {row}"

    def _name(self, block: int, index: int) -> str:
        """A file and a row in it, as in "train-00000:17"; files in several folders keep these."""
        file = self._file[block]
        row = index - self.blocks[np.searchsorted(self._file, file)]
        return f"{self.files[file][self._folder :].removesuffix('.parquet')}:{row}"

    def _read(self, block: int) -> pa.Table | str:
        """The row group of a block, or in words how it is damaged."""
        path, number = self.files[self._file[block]], int(self._number[block])
        try:
            # Opened anew: its footer costs little beside a row group, and several threads cannot
            # share a reader.
            with _open(*paths.file_system(path)) as file:
                reader = pq.ParquetFile(file, page_checksum_verification=True)
                _resolve(self._columns, reader.schema_arrow, path)  # it may have changed since
                table = reader.read_row_group(number, self._needed, use_threads=False)
        except Exception as error:
            if not _is_damage(error):
                raise
            return str(error).strip()
        end = self.blocks[block + 1] if block + 1 < len(self.blocks) else self._length
        if len(table) != end - self.blocks[block]:
            return "the file has changed since it was opened"
        return table


class _Kept:
    """The blocks that were read last, by all threads of a process; none is read twice at a time."""

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future] = OrderedDict()

    def __reduce__(self):  # without the blocks
        return _Kept, (self._most,)

    def get(self, block: int, read: Callable[[int], Any]) -> Any:
        with self._lock:
            future = self._blocks.pop(block, None)
            is_new = future is None
            future = self._blocks[block] = future or Future()  # as the newest
            if len(self._blocks) > self._most:
                self._blocks.popitem(last=False)
        if is_new:
            try:
                future.set_result(read(block))
            except BaseException as error:
                with self._lock:
                    self._blocks.pop(block, None)  # the next one tries again
                future.set_exception(error)
        return future.result()


def _open(fs: fsspec.AbstractFileSystem, name: str):
    # Arrow reads a local file without Python. It is not mapped into memory: a disk that goes away
    # would then kill the process.
    return pa.OSFile(name) if isinstance(fs, LocalFileSystem) else fs.open(name)


def _is_damage(error: Exception) -> bool:
    """Whether the contents of a file are at fault, and not the disk or network that it is on."""
    if type(error) is OSError:  # Arrow's own are such, without a number
        return error.errno is None
    return isinstance(error, ValueError | pa.ArrowNotImplementedError)


def _footer(path: str, place: _Place) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with _open(*place) as file:
            reader = pq.ParquetFile(file)
            return reader.metadata, reader.schema_arrow
    except Exception as error:
        if not _is_damage(error):
            raise
        reason = str(error).strip()
        raise ValueError(f"{path} is not a whole Parquet file: {reason}") from error


def _resolve(columns: Columns, schema: pa.Schema, path: str) -> Columns:
    """What `columns` means for this file, with a name for all that is read; see `choose`."""
    # A name that two columns have names neither.
    present = {f.name: f.type for f in schema if schema.get_field_index(f.name) >= 0}
    pick = functools.partial(choose, columns, present, path)
    images = "a column of binary, or of structs with the field bytes: binary"
    (image,) = pick("image", ("image",), _is_image, images)
    texts = "columns of strings, or of lists of strings"
    captions = pick("captions", _CAPTIONS, _is_texts, texts)
    synthetic = pick("synthetic", ("synthetic",), _is_texts, texts)
    key = pick("key", (), _is_key, "a column of strings or integers")
    usual = ("label",) if _class_names(schema, "label") else ()
    label = pick("label", usual, types.is_integer, "a column of integers")
    names = {"image": image, "key": "".join(key), "label": "".join(label)}
    return Columns(captions=captions, synthetic=synthetic, **names)


def _is_image(kind: pa.DataType) -> bool:
    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_texts(kind: pa.DataType) -> bool:
    lists = types.is_list, types.is_large_list, types.is_fixed_size_list
    is_list = any(is_such(kind) for is_such in lists)
    return _is_text(kind.value_type if is_list else kind)


def _is_key(kind: pa.DataType) -> bool:
    return _is_text(kind) or types.is_integer(kind)


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """The classes of a column by the notes of the datasets library; empty if there are none."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()


def _texts(value: pa.Scalar) -> list[Any]:
    """The texts that a value of a column stands for, as bytes or buffers: none, one or a list."""
    if not value.is_valid:
        return []
    if isinstance(value, pa.DictionaryScalar):
        return _texts(value.value)
    if types.is_integer(value.type):
        return [str(value.as_py()).encode()]
    if _is_text(value.type):
        return [value.as_buffer()]
    return [text for item in value.values for text in _texts(item)]
