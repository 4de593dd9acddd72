"""Sources made of other sources: a part of one, and several mixed."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from declip_jax.data.sources.base import Source

SLOTS = 10_000  # a mixture repeats itself after so many samples, so weights have four digits


class Part(Source):
    """Records `first` to `last` - 1 of a source."""

    def __init__(self, source: Source, first: int, last: int):
        self.source, self._first, self._last = source, first, last
        self.class_names, self.files = source.class_names, source.files
        self.blocks_together = source.blocks_together
        if source.blocks is not None:
            starts = np.maximum(source.blocks, first) - first
            ends = np.append(source.blocks[1:], len(source)) - first
            self.blocks = starts[(ends > 0) & (starts < last - first)]

    def __str__(self) -> str:
        return f"{self.source} [{self._first}:{self._last}]"

    def __len__(self) -> int:
        return self._last - self._first

    def layout(self) -> list[Any]:
        return [self._first, self._last, self.source.layout()]

    def identity(self) -> list[Any]:
        return [self._first, self._last, self.source.identity()]

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} of {self}")
        return self._first + index

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self._at(index)]

    def locate(self, index: int) -> str:
        return self.source.locate(self._at(index))


def part_of(source: Source, split: str) -> Source:
    """What "train[:90%]" or "train[1000:]" names of a source without splits of its own.

    Raises:
      ValueError: it is written otherwise, or is empty.
    """
    match = re.fullmatch(r"\w*(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if match is None:
        raise ValueError(
            f"split {split!r} of {source}, which has none of its own: expected a word, with a part "
            "of it if need be, such as 'train', 'train[:90%]' or 'train[1000:2000]'."
        )
    first, last = (
        default
        if edge is None
        else len(source) * min(int(edge[:-1]), 100) // 100
        if edge.endswith("%")
        else min(int(edge), len(source))
        for edge, default in zip(match.groups(), (0, len(source)), strict=True)
    )
    if first >= last:
        raise ValueError(f"split {split!r} of {source} is empty: it has {len(source):,} records.")
    return source if last - first == len(source) else Part(source, first, last)


class Mixture(Source):
    """Several sources with weights, their records one after the other.

    Args:
      sources: at least one; either all with the same classes or none.
      weights: each source's share of the samples that training draws, in any unit.

    Raises:
      ValueError: a weight that is not positive or below a ten-thousandth of all.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self.sources = tuple(sources)
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"the weights of a mixture must be positive numbers, not {weights}.")
        exact = np.array(weights, float) / sum(weights) * SLOTS
        # The largest remainders get what rounding down leaves over.
        slots = np.floor(exact).astype(int)
        slots[np.argsort(slots - exact, kind="stable")[: SLOTS - slots.sum()]] += 1
        if not slots.all():
            raise ValueError(
                f"the weights {weights} of a mixture: each must be at least a {SLOTS:,}th of all."
            )
        self.slots = slots  # of each SLOTS samples in a row, how many are of each source
        self._firsts = np.cumsum([0, *map(len, self.sources)])
        self.files = [file for source in self.sources for file in source.files]
        if len({source.class_names for source in self.sources}) == 1:
            self.class_names = self.sources[0].class_names

    def __str__(self) -> str:
        return " + ".join(map(str, self.sources))

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def layout(self) -> list[Any]:
        return [self.slots.tolist(), *(source.layout() for source in self.sources)]

    def identity(self) -> list[Any]:
        return [self.slots.tolist(), *(source.identity() for source in self.sources)]

    def _at(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} of {self}")
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.sources[number], index - int(self._firsts[number])

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, index = self._at(index)
        return source[index]

    def locate(self, index: int) -> str:
        source, index = self._at(index)
        return source.locate(index)
