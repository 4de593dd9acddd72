"""What a source of records is."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from declip_jax.data.records import BadRecord
from declip_jax.data.sources import paths

Refused = dict[str, tuple[int, list[str]]]  # reason -> how many, and the names of the first


def count_refused(refused: Refused, reason: str, more: int, names: Sequence[str]) -> None:
    count, first = refused.get(reason, (0, []))
    refused[reason] = count + more, [*first, *names][:3]


def tell_refused(refused: Refused) -> str:
    return "; ".join(
        f"{count:,} for {reason!r} ({', '.join(map(repr, names))}{', …' * (count > len(names))})"
        for reason, (count, names) in refused.items()
    )


class Source(Protocol):
    """Random access to the records of one split. It can be pickled, for worker processes read it.

    A record is a dict of one image with all its captions:
      image: bytes of an encoded image, or np.uint8 [H, W, 3].
      captions: list[str], at least one.
      synthetic: list[str], at least one, captions that a model wrote; not in every source.
      key: str, names the record in messages and predictions.
      label: int, an index into `class_names`; only if there are any.

    Attributes:
      name: what messages call it.
      class_names: by label; empty without classes.
      refused: what was left out of it.
      files: that have the records, one after the other, or nothing where there are none.
      blocks: int64, the first record of each part that is read as a whole, ascending from 0; None
        if any record can be read alone.
      blocks_together: training reads the records of so many blocks at nearly the same time; a
        source keeps twice as many.
    """

    name: str = "source"
    class_names: tuple[str, ...] = ()
    refused: Refused = {}
    files: Sequence[str] = ()
    blocks: np.ndarray | None = None
    blocks_together: int = 1

    def __str__(self) -> str:
        return self.name

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record; raises BadRecord if this one cannot be used, though others may be."""
        ...

    def layout(self) -> list[Any]:
        """What the order of the records follows from, in plain values; other data have another."""
        return [len(self), list(map(os.path.basename, self.files))]

    def identity(self) -> list[Any]:
        """What the records follow from, in plain values: also where the files are, and since when.

        Unlike `layout` it changes when files are moved or written anew, with whatever contents.
        """
        places = [name if paths.is_remote(name) else os.path.abspath(name) for name in self.files]
        return [self.layout(), places, paths.versions(self.files)]

    def locate(self, index: int) -> str:
        """Where a record is stored, for messages: the shard, and its place or name there."""
        return f"record {index} of {self}"

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} of {self}")


def first_record(source: Source) -> dict[str, Any] | None:
    """The first record that can be used; None if the first ten cannot."""
    for index in range(min(len(source), 10)):
        with contextlib.suppress(BadRecord):
            return source[index]
    return None


def find(firsts: np.ndarray, index: int) -> tuple[int, int]:
    """The part with a record, of parts with these first records, and the record's place in it."""
    part = int(np.searchsorted(firsts, index, side="right")) - 1
    return part, index - int(firsts[part])
