"""Images in class folders, as torchvision's ImageFolder and many downloads have them."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from declip_jax.data.input_files import Files, is_utf8
from declip_jax.data.sources.base import Refused, Source, count_refused, find, tell_refused
from declip_jax.data.sources.compact_list import CompactList, stamps
from declip_jax.data.sources.fields import class_caption
from declip_jax.data.sources.tar import is_image

# Folders that would hardly be the classes themselves.
_SPLITS = {"train", "val", "valid", "validation", "test"}


class ClassFolders(Source):
    """The images of ROOT/SPLIT/CLASS/, or of ROOT/CLASS/ for any split, on a local disk.

    They are sorted by class, then by name, both by their bytes; a part of them has only some of the
    classes. Classes are called as their folders are, also those that are empty; the only caption
    of an image says its class; its key is CLASS/FILE. Hidden files are passed over; what else is
    no image by its name is left out and told. Links are followed, wherever they lead. No image is
    opened before it is asked for. ROOT/SPLIT is taken if it has folders in it.

    Raises ValueError: no images in class folders, or fewer than two classes.
    """

    def __init__(self, root: str, split: str):
        inside = os.path.join(root, split)
        # A class can be called like the split, as the trains among the classes of CIFAR-100.
        self._root = inside if split and os.path.isdir(inside) and subfolders(inside) else root
        self.name, self._files = self._root, Files(self._root)
        self.refused: Refused = {}
        self.class_names = tuple(self._usable(subfolders(self._root)))
        images = [list(self._images(folder)) for folder in self.class_names]
        if not any(images):
            missing = f"no folder {split!r} with class folders in it, and " * (self._root == root)
            raise ValueError(
                f"{self._root!r} has {missing}no images in class folders, as <class>/<image>; it "
                f"has {sorted(os.listdir(self._root))[:5]}."
            )
        if len({*self.class_names} - _SPLITS) < 2:
            raise ValueError(
                f"{self._root!r} has images in {list(self.class_names)}: expected a folder for "
                "each class, at least two. Images with captions are opened by the file that lists "
                "them."
            )
        self._names = CompactList(itertools.chain(*images))
        self._firsts = np.cumsum([0, *map(len, images)])[:-1]  # of each class
        if self.refused:
            logging.warning("%s: left out %s", self, tell_refused(self.refused))

    def _images(self, folder: str) -> Iterator[str]:
        names = os.listdir(os.path.join(self._root, folder))
        for name in self._usable(sorted(n for n in names if not n.startswith("."))):
            if is_image(name.rpartition(".")[2].lower()):
                yield name
            else:
                count_refused(self.refused, "no image", 1, [f"{folder}/{name}"])

    def _usable(self, names: list[str]) -> Iterator[str]:
        for name in names:
            if is_utf8(name):
                yield name
            else:
                shown = name.encode(errors="backslashreplace").decode()
                count_refused(self.refused, "not UTF-8", 1, [shown])

    def __len__(self) -> int:
        return len(self._names)

    def layout(self) -> list[Any]:
        return [*super().layout(), self._firsts.tolist(), self._names.digest()]

    def identity(self) -> list[Any]:
        keys = (self._place(index)[1] for index in range(len(self)))
        return [self.layout(), stamps(self._root, keys)]

    def _place(self, index: int) -> tuple[int, str]:
        """The label of an image, and its key."""
        self._check(index)
        label, _ = find(self._firsts, index)
        return label, f"{self.class_names[label]}/{self._names[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        label, key = self._place(index)
        return {
            "image": self._files.read(key),
            "captions": [class_caption(self.class_names[label])],
            "key": key,
            "label": label,
        }

    def locate(self, index: int) -> str:
        return os.path.join(self._root, self._place(index)[1])


def subfolders(root: str) -> list[str]:
    """The names of the folders in `root` that are not hidden, sorted."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
