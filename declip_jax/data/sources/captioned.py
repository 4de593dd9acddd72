"""Image files and their captions, which a file lists: Karpathy's splits, CSV, TSV or JSON lines."""

import functools
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from declip_jax.data.input_files import Captions, Files, csv_table, jsonl_rows
from declip_jax.data.options import Columns
from declip_jax.data.records import BadRecord
from declip_jax.data.sources.base import Refused, Source, count_refused, tell_refused
from declip_jax.data.sources.compact_list import CompactList, stamps
from declip_jax.data.sources.fields import choose

# Where `Columns` names nothing, the first of these that is there.
_IMAGES = ("image", "filename", "file_name", "filepath", "image_path", "path")
_CAPTIONS = ("captions", "caption", "texts", "text", "sentences", "title")

_PARTS = {"train": ("train", "restval")}  # Karpathy's restval is what training gets beside train

MAX_JSON_BYTES = 1 << 30  # of one that is read as a whole
LOOKED_FOR = 100  # images, to find the folder that they are in


class Captioned(Source):
    """The images of one split that a file lists, in the order in which it first names them.

    All captions of an image are one record, in the order of the file; so are rows that name the
    image again. Its key is its name in the file. Rows that cannot be used are left out and told.
    The list is held in memory: data of many millions are better prepared first.

    Args:
      path: the list, on a local disk.
        .json: {"images": [{"filepath": folder, if any, "filename": …, "split": …,
          "sentences": [{"raw": caption}, …]}, …]}, as the files of Karpathy's splits are.
        .csv, .tsv: with a header, a row for each image or for each caption.
        .jsonl: an object a line, with one caption or a list of them in a field.
      folder: that the images' names are relative to; "" for the first of these that has any of
        the first 100: the folder of the list, and `images` in it.
      split: of those in the list, where it has them: in the column "split" of CSV, TSV and JSON
        lines. "train" includes what Karpathy calls "restval". Without any, all images are in it.
      columns: image, captions and synthetic are columns or fields.

    Raises:
      ValueError: no such file or folder, a list of another kind, columns that it lacks, no such
        split in it, or none of its first 100 images in the folder.
    """

    def __init__(self, path: str, folder: str, split: str, columns: Columns):
        for field in ("key", "label"):
            if value := getattr(columns, field):
                raise ValueError(
                    f"config.data.columns.{field}={value!r}: of {path} the key is the image's "
                    "name, and labels are not read; leave it empty."
                )
        if not os.path.isfile(path):
            raise ValueError(f"{path!r}: no such file on a local disk.")
        self.name = f"{path} {split}".rstrip()
        self.files = [path]
        captions, others = Captions(synthetic=False), set()
        for of_split, row in _rows(path, columns, captions):
            if of_split is None or of_split in _PARTS.get(split, (split,)):
                captions.add(*row)
            else:
                others.add(of_split)
        self._has_synthetic = captions.needs_synthetic
        index = captions.index()
        self.refused: Refused = {}
        for entry in index.refused:
            count_refused(self.refused, entry["reason"], 1, [entry["key"]])
        if others and not captions.by_key:
            raise ValueError(
                f"{path} has nothing of the split {split!r}, only of {sorted(others)}."
            )
        told = f"left out {tell_refused(self.refused)}" if self.refused else "it is empty"
        if not index.items:
            raise ValueError(f"{path} lists no images that can be used: {told}.")
        if self.refused:
            logging.warning("%s: %s", self, told)
        self._files = _find(path, folder, [item.key for item in index.items[:LOOKED_FOR]])
        self._items = CompactList([item.key, item.captions, item.synthetic] for item in index.items)

    def __len__(self) -> int:
        return len(self._items)

    def layout(self) -> list[Any]:
        return [*super().layout(), self._items.digest()]

    def identity(self) -> list[Any]:
        keys = (self._items[index][0] for index in range(len(self)))
        return [*super().identity(), stamps(self._files.root, keys)]

    def _item(self, index: int) -> list[Any]:
        self._check(index)
        return self._items[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, captions, synthetic = self._item(index)
        record = {"image": self._files.read(key), "captions": captions, "key": key}
        if self._has_synthetic:
            record["synthetic"] = synthetic
        return record

    def locate(self, index: int) -> str:
        return f"{self.files[0]}: {self._item(index)[0]}"


def _find(path: str, folder: str, keys: Sequence[str]) -> Files:
    """The files of the first place that has one of the images."""
    beside = os.path.dirname(path) or "."
    places = [folder] if folder else [beside, os.path.join(beside, "images")]
    for place in filter(os.path.isdir, places):
        files = Files(place)
        for key in keys:
            try:
                files.read(key)
            except BadRecord as error:
                if error.reason in ("missing image", "unsafe name"):
                    continue
            return files
    raise ValueError(
        f"{path}: none of its first {len(keys)} images, such as {keys[0]!r}, is in "
        f"{' or '.join(places)}. Name the folder that the images' names are relative to behind an "
        f"@, as in '{path}@/data/images'; no name may lead out of it."
    )


# A split, or None where the list has none, and what `Captions.add` takes.
_Row = tuple[str | None, tuple[str, str, Sequence[str], Sequence[str]]]


def _rows(path: str, columns: Columns, captions: Captions) -> Iterator[_Row]:
    if path.endswith(".json"):
        if columns.image or columns.captions or columns.synthetic:
            raise ValueError(
                f"config.data.columns: the fields of {path} have fixed names; leave them empty."
            )
        yield from _karpathy(path)
        return
    # What is not UTF-8 becomes surrogates, for which rows are refused.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        if path.endswith(".jsonl"):
            rows = jsonl_rows(stream, path, (), captions.refuse)
        else:
            delimiter = "\t" if path.endswith(".tsv") else ","
            header, rows = csv_table(stream, path, captions.refuse, delimiter)
            _choose(columns, dict.fromkeys(header, "text"), path)  # there may be no rows
        yield from _of_lines(rows, path, columns, captions)


def _karpathy(path: str) -> Iterator[_Row]:
    size = os.path.getsize(path)
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, which are read at once: at most 1 GiB.")
    try:
        with open(path, encoding="utf-8-sig") as stream:
            content = json.load(stream)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ValueError(
            f'{path} is no list of Karpathy\'s splits: expected {{"images": [{{"filename": …, '
            '"split": …, "sentences": [{"raw": …}, …]}, …]}. Name a .jsonl file if it has an '
            "object on each line."
        )
    for number, image in enumerate(images):
        try:
            name = posixpath.join(image.get("filepath", ""), image["filename"])
            texts = [sentence["raw"] for sentence in image["sentences"]]
            if not all(isinstance(text, str) for text in (name, image["split"], *texts)):
                raise TypeError("expected texts")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: images[{number}] is no image of Karpathy's splits, with filename, split "
                f"and sentences of raw texts: {type(error).__name__}: {error}"
            ) from None
        yield image["split"], (f"images[{number}]", name, texts, ())


def _of_lines(
    rows: Iterator[tuple[str, dict[str, Any]]], path: str, columns: Columns, captions: Captions
) -> Iterator[_Row]:
    chosen = None
    for where, row in rows:
        if chosen is None:
            present = {field: _kind(value) for field, value in row.items()}
            chosen = image, written, synthetic, split = _choose(columns, present, path)
            captions.needs_synthetic = bool(synthetic)
        texts = {field: _texts(row.get(field)) for field in (*written, *synthetic)}
        name, of_split = row.get(image), row.get(split)
        are_texts = isinstance(name, str) and isinstance(of_split, str | None)
        if are_texts and None not in texts.values():
            both = (
                [text for field in fields for text in texts[field]]
                for fields in (written, synthetic)
            )
            yield of_split, (where, name, *both)
        else:
            fields = ", ".join(filter(None, (image, *written, *synthetic, split)))
            detail = f"expected texts in {fields}; it has {sorted(row)[:20]}"
            captions.refuse(where, "bad row", detail)


def _choose(
    columns: Columns, present: dict[str, str], path: str
) -> tuple[str, Sequence[str], Sequence[str], str]:
    """What has the image's name, captions, synthetic ones, and the split or "" if nothing does."""
    is_text, is_texts = {"text"}.__contains__, {"text", "list"}.__contains__
    pick = functools.partial(choose, columns, present, path)
    (image,) = pick("image", _IMAGES, is_text, "a column of file names")
    captions = pick("captions", _CAPTIONS, is_texts, "columns of texts")
    synthetic = pick("synthetic", ("synthetic",), is_texts, "columns of texts")
    return image, captions, synthetic, "split" if "split" in present else ""


def _kind(value: Any) -> str:
    """Of a value that JSON can hold."""
    return {str: "text", list: "list"}.get(type(value), type(value).__name__)


def _texts(value: Any) -> list[str] | None:
    """A text, or a list of texts, as a list; None if it is neither."""
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(value, str) for value in values) else None
