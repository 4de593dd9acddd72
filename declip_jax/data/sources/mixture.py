"""Several sources as one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from declip_jax.data.sources.base import Source, find

SLOTS = 10_000  # a mixture repeats itself after so many samples, so weights have four digits


class Mixture(Source):
    """Several sources with weights, their records one after the other.

    Args:
      sources: at least one; either all with the same classes or none.
      weights: each source's share of the samples that training draws, in any unit.

    Raises ValueError: a weight that is not positive or below a ten-thousandth of all.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self.sources = tuple(sources)
        self.name = " + ".join(map(str, sources))
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

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def layout(self) -> list[Any]:
        return [self.slots.tolist(), *(source.layout() for source in self.sources)]

    def identity(self) -> list[Any]:
        return [self.slots.tolist(), *(source.identity() for source in self.sources)]

    def _at(self, index: int) -> tuple[Source, int]:
        self._check(index)
        number, index = find(self._firsts, index)
        return self.sources[number], index

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, index = self._at(index)
        return source[index]

    def locate(self, index: int) -> str:
        source, index = self._at(index)
        return source.locate(index)
