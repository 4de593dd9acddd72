"""Webdataset shards, as img2dataset writes them, with random access through an index.

A shard is a tar file; its members whose names agree up to the first dot of the last part, one after
the other, are a sample: KEY.jpg, KEY.txt, KEY.json. The index has the span of each sample in its
tar, so that one read gets all of it. It says nothing of what the samples mean, and so serves any
choice of columns.

Sets of CLIP_benchmark are such shards too, ROOT/SPLIT/0.tar and so on, with the class of a sample
in KEY.cls and the names of the classes in ROOT/classnames.txt. Where ROOT/dataset_type.txt says
"retrieval", each line of KEY.txt is a caption.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from declip_jax.data.input_files import MAX_CAPTION, check_image_size, is_utf8
from declip_jax.data.options import Columns
from declip_jax.data.records import BadRecord
from declip_jax.data.sources import paths
from declip_jax.data.sources.base import Refused, Source, find, tell_refused
from declip_jax.data.sources.fields import class_caption
from declip_jax.data.sources.tar import BLOCK, files_of, is_image, key_hash, plain_files
from declip_jax.data.sources.tar_index import RECORD, open_index

MAX_NOTE_BYTES = 16 << 20  # of a file that tells what shards have


class WebDataset(Source):
    """The samples of tar files that have an image, in the order of the files and within them.

    The index is made by the first who opens the shards, in parallel, and kept in the cache folder;
    a tar of another size or time than when it was indexed is indexed anew. What cannot be used is
    left out and told: damaged ends of shards, unsafe names, samples without image or with a key
    that the tar had before.

    Args:
      pattern: shards, see `paths.expand`.
      columns: image and captions are extensions such as "png" and "txt"; captions may also be
        fields of KEY.json, as in "json.caption", and the key has to be one unless it is the tar's.
        The label is "cls" or another name, of a number from 0, where classnames.txt is beside the
        shards or one folder up; a sample of them without a text has its class as the caption.
      cache: folder for the index; "" for .declip_index beside local shards, where that can be
        written, or else declip_jax in ~/.cache.

    Raises:
      ValueError: no such shards, no samples in them, columns that are no such names, a label
        without classnames.txt, or no folder for the index.
    """

    def __init__(self, pattern: str, columns: Columns, cache: str = ""):
        self.name = f"webdataset {pattern}"
        columns = dataclasses.replace(
            columns,
            image=columns.image.lower().lstrip("."),
            captions=tuple(name.lstrip(".") for name in columns.captions),
            synthetic=tuple(name.lstrip(".") for name in columns.synthetic),
            label=columns.label.lstrip("."),
        )
        if columns.key and not columns.key.startswith("json."):
            raise ValueError(
                f"config.data.columns.key={columns.key!r}: expected a field of KEY.json, such as "
                "'json.uid', or '' for the name in the tar."
            )
        self._columns = columns
        self.files = paths.expand(pattern, ".tar")
        self.class_names = _class_names(self.files[0])
        if columns.label and not self.class_names:
            raise ValueError(
                f"config.data.columns.label={columns.label!r}: no classnames.txt is beside "
                f"{self.files[0]} or one folder up, with the names of the classes, one a line. "
                "Write one, or leave the label out."
            )
        _, kind = _beside(self.files[0], "dataset_type.txt")
        self._caption_a_line = kind.strip().lower() == "retrieval"
        table = open_index(self.files, cache)
        contents = json.loads(table.read_text(encoding="utf-8"))
        self._index = table.with_suffix(".bin")
        self._firsts = np.cumsum([0, *contents["records"]])  # of each tar, and behind the last
        self.refused: Refused = contents["refused"]
        if self.refused:
            logging.warning("%s: left out %s", self, tell_refused(self.refused))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_records"}

    @functools.cached_property
    def _records(self) -> np.ndarray:
        """RECORD [N]."""
        return np.asarray(np.memmap(self._index, RECORD, "r"))

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def layout(self) -> list[Any]:
        return [*super().layout(), self._firsts.tolist()]

    def key_hashes(self) -> np.ndarray:
        """uint64 [N]: equal for equal keys in different shards; see `key_hash`."""
        return self._records["key"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, columns = self._read(index), self._columns
        record = {
            "image": sample.image(columns.image),
            "key": sample.field(columns.key) if columns.key else sample.key,
        }
        if self.class_names:
            record["label"] = sample.label(columns.label or "cls", len(self.class_names))
        record["captions"] = self._captions(sample, record)
        if columns.synthetic:
            record["synthetic"] = sample.texts(columns.synthetic, "no synthetic caption")
        return record

    def _captions(self, sample: "_Sample", record: Mapping[str, Any]) -> list[str]:
        columns = self._columns.captions or (("txt",) if "txt" in sample.parts else ())
        if not columns and self.class_names and not sample.fields.get("caption"):
            return [class_caption(self.class_names[record["label"]])]
        texts = sample.texts(columns or ("json.caption",), "no caption")
        if self._caption_a_line:
            texts = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
        return texts

    def locate(self, index: int) -> str:
        tar, number = self._place(index)
        try:
            return f"{tar}: {self._read(index).key}"
        except (BadRecord, OSError):
            return f"{tar}: record {number}"

    def _place(self, index: int) -> tuple[str, int]:
        """The tar of a sample, and its number there."""
        self._check(index)
        shard, number = find(self._firsts, index)
        return self.files[shard], number

    def _read(self, index: int) -> "_Sample":
        tar, _ = self._place(index)
        block, blocks, key = self._records[index].item()
        start, size = block * BLOCK, blocks * BLOCK
        data = memoryview(paths.read_range(tar, start, size))
        sample = None
        with contextlib.suppress(tarfile.ReadError):
            files = plain_files(data)
            if files is None:
                files = files_of(io.BytesIO(data), len(data), refuse=lambda reason, name: None)
            for file in files:
                sample = sample or _Sample(file.key, {})
                if file.key == sample.key:
                    sample.parts.setdefault(file.extension, data[file.data])
            if len(data) == size and sample and key_hash(sample.key) == key:
                return sample
        raise BadRecord(
            "shard changed",
            f"{tar} is not what was indexed at byte {start:,}; opened again, it is indexed anew",
        )


class _Sample:
    """What a tar has of a sample; extensions are in lower case, in the order of the tar."""

    def __init__(self, key: str, parts: dict[str, memoryview]):
        self.key, self.parts = key, parts

    def image(self, extension: str) -> bytes:
        """The member with `extension`, or the first image."""
        extension = extension or next(filter(is_image, self.parts), "")
        if extension not in self.parts:
            raise BadRecord("no image", f"no {extension or 'image'} among {sorted(self.parts)}")
        data = self.parts[extension]
        check_image_size(len(data))
        return bytes(data)

    def texts(self, columns: Sequence[str], reason: str) -> list[str]:
        """The texts of all columns that are not blank; none is a bad record for `reason`."""
        texts = []
        for column in columns:
            if column.startswith("json."):
                value = self.fields.get(column.removeprefix("json."))
                values = value if isinstance(value, list) else [value]
                values = [value for value in values if value is not None]
                if not all(isinstance(value, str) for value in values):
                    raise BadRecord("bad JSON", f"{column} is {str(values)[:80]}, expected texts")
                texts += values
            elif column in self.parts:
                texts.append(self._text(column))
        if not all(map(is_utf8, texts)):
            raise BadRecord("not UTF-8", f"half of a surrogate pair in {', '.join(columns)}")
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            fields = self.fields if any(c.startswith("json.") for c in columns) else ()
            has = [*self.parts, *(f"json.{field}" for field in fields)][:20]
            raise BadRecord(reason, f"nothing in {', '.join(columns)}; the sample has {has}")
        return texts

    def field(self, column: str) -> str:
        """The field that `column` names, a number or a text."""
        value = self.fields.get(column.removeprefix("json."))
        if not isinstance(value, str | int) or not is_utf8(str(value)):
            raise BadRecord("no key", f"{column} is {str(value)[:80]!r}")
        return str(value)

    def label(self, column: str, classes: int) -> int:
        """The number of a class that `column` names, below `classes`."""
        if column.startswith("json."):
            text = str(self.fields.get(column.removeprefix("json."), ""))
        else:
            text = self._text(column).strip() if column in self.parts else ""
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= classes:
            has = (
                f"{column} is {text[:80]!r}" if text else f"no {column} among {sorted(self.parts)}"
            )
            raise BadRecord("no label", f"{has}; expected a number below {classes}")
        return int(text)

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """What KEY.json has."""
        if "json" not in self.parts:
            return {}
        text = self._text("json")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRecord("bad JSON", str(error)) from None
        if not isinstance(fields, dict):
            raise BadRecord("bad JSON", f"{type(fields).__name__}, expected an object")
        return fields

    def _text(self, extension: str) -> str:
        data = self.parts[extension]
        if len(data) > MAX_CAPTION:
            detail = f"{extension} of {len(data):,} bytes, at most {MAX_CAPTION:,}"
            raise BadRecord("caption too long", detail)
        try:
            return str(data, "utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRecord("not UTF-8", f"{extension}: {error}") from None


def _class_names(tar: str) -> tuple[str, ...]:
    """By label, from classnames.txt; empty where there is none."""
    path, text = _beside(tar, "classnames.txt")
    names = [line.strip() for line in text.rstrip().split("\n")] if path else []
    if "" in names:
        line = names.index("") + 1
        raise ValueError(
            f"{path}: line {line} is blank; expected the name of a class on each line."
        )
    return tuple(names)


def _beside(tar: str, name: str) -> tuple[str, str]:
    """Path and text of a file in the folder of a tar or one up; "", "" if neither has it."""
    for folder in (os.path.dirname(tar), os.path.dirname(os.path.dirname(tar))):
        path = os.path.join(folder, name)
        try:
            data = paths.read_range(path, 0, MAX_NOTE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if len(data) > MAX_NOTE_BYTES:
            raise ValueError(
                f"{path} has more than {MAX_NOTE_BYTES:,} bytes; is it a list of names?"
            )
        try:
            return path, str(data, "utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
    return "", ""
