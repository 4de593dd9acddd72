"""The sets that papers report: class names, prompts, splits and metrics, and how to open them.

Each is a JSON file here: title, source (where its names and prompts are from), metric, images (of
its test split), tfds (what TFDS calls it, if it has it), splits, folders (other names that its
folder may have), templates, and classes, pairs of the label in TFDS and in folders with the name
that prompts use, in the order of the source. A set like another has that one's templates and
classes, of these only its `labels`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from declip_jax.data.sources import Columns, Source, open_source, paths
from declip_jax.hints import did_you_mean

NAMES = (
    "cifar10",
    "cifar100",
    "food101",
    "oxford_pets",
    "flowers102",
    "sun397",
    "stanford_cars",
    "dtd",
    "caltech101",
    "fgvc_aircraft",
    "imagenet",
    "imagenet_v2",
    "imagenet_a",
    "imagenet_r",
    "imagenet_sketch",
)
RETRIEVAL = ("flickr30k", "mscoco")


class Absent(ValueError):
    """A set is not on this machine."""


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """What is known of a set. Those for retrieval have no classes and templates."""

    name: str  # of NAMES or RETRIEVAL
    title: str  # for people
    source: str  # where names and prompts are from, a URL
    metric: str  # that papers report, such as "top1" or "mean_per_class"
    # As they read in a prompt, in the order of the source. Two may be the same: OpenAI's list has
    # two missiles and two sunglasses for ImageNet.
    class_names: tuple[str, ...]
    labels: tuple[str, ...]  # what TFDS and folders call each, in the same order; all different
    # That data may name though the set has no images of them: ImageNet-A and -R are of 200 classes,
    # and TFDS stores them with the labels of all 1,000.
    other_labels: tuple[str, ...]
    templates: tuple[str, ...]  # prompts, each with a `{}` for the name
    # {"train", "validation" or "test": the split of TFDS}; only those that the set has. Where train
    # and validation are the same, `open_set` parts it.
    splits: Mapping[str, str]
    tfds: str  # what TFDS calls it, or ""
    folders: tuple[str, ...]  # what its folder may be called besides `name`
    files: tuple[str, ...]  # that stand for the set if they are in its folder
    images: int  # of the test split


@functools.cache
def get(name: str) -> EvalSet:
    """A set of NAMES or RETRIEVAL. Raises ValueError if there is none of that name."""
    known = (*NAMES, *RETRIEVAL)
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"set {name!r} is unknown.{hint} Expected one of {known}.")
    stored = _read(name)
    parent = _read(stored["like"]) if "like" in stored else stored
    classes = dict(parent.get("classes", ()))
    labels = tuple(stored.get("labels", classes))
    as_stored = ("title", "source", "metric", "splits", "tfds", "images")
    return EvalSet(
        name=name,
        class_names=tuple(classes[label] for label in labels),
        labels=labels,
        other_labels=tuple(label for label in classes if label not in labels),
        templates=tuple(parent.get("templates", ())),
        folders=tuple(stored["folders"]),
        files=tuple(stored.get("files", ())),
        **{field: stored[field] for field in as_stored},
    )


def _read(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def open_set(name: str, split: str, data_dir: str, source: str = "") -> Source:
    """A split of a set, its labels in the order of `get(name).class_names`.

    Where no source is given, the first of these is opened:
      what TFDS wrote to DATA_DIR;
      DATA_DIR/NAME, or DATA_DIR/ with one of the set's `folders` (wds_…, as CLIP_benchmark calls
      them), in any format of `open_source`; splits are folders in it, SPLIT/CLASS/IMAGE and
      SPLIT/*.tar, or parts of file names;
      what TFDS wrote to $TFDS_DATA_DIR or ~/tensorflow_datasets.

    The source's classes are matched by label or name; case, and what stands between words, do not
    matter. Where all are numbers, they count in the order of the set, from 0. All classes must be
    there; for Caltech-101 these include the background, as OpenAI's list does.

    Of a set, or of data, without images for validation, the training images that `held_out` names
    are for validation, and the others for training.

    Args:
      name: of NAMES or RETRIEVAL.
      split: "train", "validation" or "test", as the evaluation protocol means it: ImageNet's test
        split is what TFDS calls validation. Data without splits serve as "test" alone.
      data_dir: a local folder.
      source: the data, as `open_source` takes them; "" to look for them.

    Raises:
      Absent: no source is given, and nothing is found, or not this split.
      ValueError: an unknown set, a split that it or the source lacks, or other classes.
    """
    known = get(name)
    if split not in known.splits:
        raise ValueError(f"{name} has no split {split!r}; it has {list(known.splits)}.")
    place = source or _find(known, data_dir)
    if place.startswith("tfds:"):
        place = _written_by_tfds(place.removeprefix("tfds:")) or place
    part = ""
    if split in ("train", "validation") and _shares_training(known, place):
        split, part = "train", split
    words = _words(known.splits[split]) + ["test"] * (split == "test")
    present = [word for word in words if _has_split(place, word)]
    if not present and "test" not in words:
        kind = ValueError if source else Absent
        raise kind(
            f"{place!r} has no split {' or '.join(words)} of {name}; data that do not tell splits "
            "apart serve as the test split alone."
        )
    columns = Columns()
    if known.class_names and _has_labels_alone(place):
        columns = Columns(captions=("label",))  # records have a caption, though none is used
    opened = open_source(place, present[0] if present else "test", columns)
    return _SetSource(opened, known, part) if known.class_names else opened


def _words(stored: str) -> list[str]:
    """What a split may be called: as TFDS calls it, or otherwise."""
    return [stored, *{"validation": ["val"], "val": ["validation"]}.get(stored, [])]


def _shares_training(known: EvalSet, place: str) -> bool:
    """Whether a part of the training split is for validation, as there is none for it."""
    validation = known.splits.get("validation")
    if validation in (None, known.splits["train"]):
        return validation is not None
    return not any(_has_split(place, word) for word in _words(validation))


def held_out(count: int) -> np.ndarray:
    """Which of so many training records are for validation, where a set has none for it.

    One of every ten in a row, drawn by seed 0: of records sorted by class a tenth of each class,
    and of records in turns of classes all classes.
    """
    starts = np.arange(0, count, 10)
    return np.random.default_rng(0).integers(starts, np.minimum(starts + 10, count))


def _find(known: EvalSet, data_dir: str) -> str:
    """Where the data are, as `open_source` takes it."""
    folders = [os.path.join(data_dir, folder) for folder in (known.name, *known.folders)]
    places = [os.path.join(folders[0], file) for file in known.files] + folders
    by_tfds = _written_by_tfds(known.tfds, data_dir=data_dir)
    here = (p for p in places if os.path.isfile(p) or (os.path.isdir(p) and os.listdir(p)))
    found = by_tfds or next(here, "") or _written_by_tfds(known.tfds)
    if found:
        return found
    message = f"{known.name} is not on this machine: there is no {', '.join(places)}"
    advice = f"Put it into {folders[0]}, or name its place as the source"
    if known.tfds:
        elsewhere = f"{data_dir}, $TFDS_DATA_DIR or ~/tensorflow_datasets"
        message += f", and no TFDS data set {known.tfds} in {elsewhere}"
        build = f"tfds build {known.tfds} --file_format=array_record --data_dir={data_dir}"
        advice += f"; {build} writes it, where TensorFlow is installed"
    raise Absent(f"{message}. {advice}.")


def _written_by_tfds(name: str, **where: str) -> str:
    """The directory of the newest version of a TFDS data set; "" if there is none."""
    if not name:
        return ""
    from tensorflow_datasets.core import read_only_builder, registered

    with contextlib.suppress(registered.DatasetNotFoundError):
        return os.fspath(read_only_builder.builder_from_files(name, **where).data_path)
    return ""


def _has_labels_alone(place: str) -> bool:
    """Whether it is a TFDS directory without captions."""
    with contextlib.suppress(Exception):  # of several kinds, which `open_source` tells about
        return _is_tfds(place) and "captions" not in _tfds_info(place).features
    return False


def _is_tfds(place: str) -> bool:
    fs, path = paths.file_system(place)
    return fs.isfile(os.path.join(path, "dataset_info.json"))


def _tfds_info(place: str) -> Any:
    from tensorflow_datasets import builder_from_directory

    return builder_from_directory(place).info


def _has_split(place: str, word: str) -> bool:
    """Whether data tell splits apart, and have this one.

    A folder has it as WORD-00000-of-00010.*, or as a folder WORD with folders or shards in it.
    """
    if _is_tfds(place):
        try:
            return word in _tfds_info(place).splits
        except Exception:  # of several kinds, which `open_source` tells about
            return True
    fs, path = paths.file_system(place)
    if not fs.isdir(path):
        # A tar or Parquet file has no splits; whatever else is a file has them in it.
        return re.search(r"\.(tar|parquet)\}?$", place) is None
    inside = os.path.join(path, word)
    if fs.isdir(inside):
        # A class can be called like a split, as the trains of CIFAR-100: it has images.
        return any(
            entry["type"] == "directory" or entry["name"].endswith((".tar", ".parquet"))
            for entry in fs.ls(inside, detail=True)
        )
    names = map(os.path.basename, fs.ls(path, detail=False))
    return any(re.match(rf"{word}-\d+-of-\d+", name) for name in names)


class _SetSource(Source):
    """The records of a source with the labels of a set, all or those of one part.

    Args:
      source: with classes.
      known: the set.
      part: "train" or "validation", which share the source, or "" for all of it.

    Raises ValueError: the source has other classes than the set.
    """

    def __init__(self, source: Source, known: EvalSet, part: str):
        self._source, self._set, self._part = source, known.name, part
        self._labels = _labels(source, known)
        self.class_names, self.files = known.class_names, source.files
        indices, validation = np.arange(len(source)), held_out(len(source))
        parts = {"": indices, "validation": validation, "train": np.delete(indices, validation)}
        self._indices = parts[part]

    def __str__(self) -> str:
        return f"{self._set} ({self._part + ' of ' if self._part else ''}{self._source})"

    def __len__(self) -> int:
        return len(self._indices)

    def layout(self) -> list[Any]:
        return [self._set, self._part, self._labels, self._source.layout()]

    def identity(self) -> list[Any]:
        return [self._set, self._part, self._labels, self._source.identity()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[int(self._indices[index])]
        label = self._labels[record["label"]]
        if label is None:
            raise ValueError(
                f"its class {self._source.class_names[record['label']]!r} is not among the "
                f"{len(self.class_names)} of {self._set}"
            )
        return record | {"label": label}

    def locate(self, index: int) -> str:
        return self._source.locate(int(self._indices[index]))


def _labels(source: Source, known: EvalSet) -> list[int | None]:
    """By label of the source, that of the set; None for those that the set has no images of."""
    if not source.class_names:
        raise ValueError(
            f"{source} has no classes, as {known.name} needs them: class folders, a ClassLabel "
            "'label' in TFDS, or KEY.cls in webdataset shards with classnames.txt beside them."
        )
    given = list(map(_fold, source.class_names))
    names = list(map(_fold, known.class_names))
    if given == names:
        return list(range(len(names)))  # also where one stands for two, which order tells apart
    places: dict[str, int | None]
    if all(name.isdecimal() for name in given):
        places = {str(number): number for number in range(len(names))}
    else:
        places = {n: place for place, n in enumerate(names) if names.count(n) == 1}
        places |= dict.fromkeys(map(_fold, known.other_labels))
        places |= {_fold(label): place for place, label in enumerate(known.labels)}
    found = [places.get(name) for name in given]
    unknown = [s for s, g in zip(source.class_names, given, strict=True) if g not in places]
    lacking = [label for place, label in enumerate(known.labels) if place not in found]
    again = [place is not None and place in found[:i] for i, place in enumerate(found)]
    twice = list(itertools.compress(source.class_names, again))
    wrong = {"has the unknown": unknown, "lacks": lacking, "has a second time": twice}
    problems = "; ".join(
        f"it {problem} {', '.join(map(repr, which[:3]))}{', …' * (len(which) > 3)}"
        for problem, which in wrong.items()
        if which
    )
    if problems:
        raise ValueError(
            f"{source} has {len(given)} classes, {known.name} {len(names)}: {problems}. Its "
            "classes must be called as in TFDS or as in the prompts."
        )
    return found


def _fold(name: str) -> str:
    return re.sub(r"[\s_/-]+", " ", name).strip().casefold()
