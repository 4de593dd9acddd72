"""A part of a source, as 'train[:90%]' names it."""

import re
from typing import Any

import numpy as np

from declip_jax.data.sources.base import Source


class Part(Source):
    """Records `first` to `last` - 1 of a source."""

    def __init__(self, source: Source, first: int, last: int):
        self.source, self._first, self._last = source, first, last
        self.name = f"{source} [{first}:{last}]"
        self.class_names, self.files = source.class_names, source.files
        self.blocks_together = source.blocks_together
        if source.blocks is not None:
            starts = np.maximum(source.blocks, first) - first
            ends = np.append(source.blocks[1:], len(source)) - first
            self.blocks = starts[(ends > 0) & (starts < last - first)]

    def __len__(self) -> int:
        return self._last - self._first

    def layout(self) -> list[Any]:
        return [self._first, self._last, self.source.layout()]

    def identity(self) -> list[Any]:
        return [self._first, self._last, self.source.identity()]

    def _at(self, index: int) -> int:
        self._check(index)
        return self._first + index

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self._at(index)]

    def locate(self, index: int) -> str:
        return self.source.locate(self._at(index))


def part_of(source: Source, split: str) -> Source:
    """What "train[:90%]" or "train[1000:]" names of a source; ValueError if that is nothing."""
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
