"""Which record each sample of a training run is."""

import functools

import grain
import numpy as np

from declip_jax.data.sources.base import Source, find
from declip_jax.data.sources.mixture import Mixture


class Order:
    """Sample number -> index of a record, without end; every epoch of a source is a permutation.

    What sample n is follows from the source, the weights of its mixture, the seed and n alone, and
    is found without the samples before it.
    """

    def __init__(self, source: Source, seed: int):
        parts, slots = [source], np.zeros(1, int)
        if isinstance(source, Mixture):
            parts = source.sources
            slots = np.repeat(np.arange(len(parts)), source.slots)
            slots = np.random.default_rng(seed).permutation(slots)
        self._seed = seed
        # The source of each of so many samples in a row, and how many before it are of the same;
        # after these it begins again.
        self._slots = slots
        self._counts = np.bincount(slots)
        self._before = np.empty_like(slots)
        for number, count in enumerate(self._counts):
            self._before[slots == number] = np.arange(count)
        self._lengths = [len(part) for part in parts]
        self._firsts = [sum(self._lengths[:number]) for number in range(len(parts))]
        self._orders = [shuffle(part, _fold(seed, number)) for number, part in enumerate(parts)]

    def __getitem__(self, sample: int) -> int:
        turn, slot = divmod(sample, len(self._slots))
        number = self._slots[slot]
        place = turn * int(self._counts[number]) + int(self._before[slot])
        return self._firsts[number] + self._orders[number][place]

    def replacement(self, sample: int, attempt: int) -> int:
        """Another record of the same source, for a sample whose own one cannot be used."""
        number = self._slots[sample % len(self._slots)]
        rng = np.random.default_rng((self._seed, sample, attempt))
        return self._firsts[number] + int(rng.integers(self._lengths[number]))


def shuffle(source: Source, seed: int):
    """Place -> record of one source, a new permutation for each epoch, by `[]`."""
    if source.blocks is not None:
        return BlockShuffle(source.blocks, len(source), source.blocks_together, seed)
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()


def _fold(seed: int, number: int) -> int:
    """The seed of a source of a mixture; that of the first, or of one alone, is the run's."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


class BlockShuffle:
    """As a shuffle of all records, but with those of a block at nearly the same time.

    Each epoch permutes the blocks, takes `together` of them at a time, and permutes their records.
    `blocks` has the first record of each, ascending from 0, and `length` is of all.
    """

    def __init__(self, blocks: np.ndarray, length: int, together: int, seed: int):
        self._blocks, self._length = np.asarray(blocks, np.int64), length
        self._sizes = np.diff(self._blocks, append=length)
        self._together, self._seed = together, seed
        # Threads of one process are at most in two epochs and windows at a time.
        self._epoch = functools.lru_cache(2)(self._epoch)
        self._window = functools.lru_cache(4)(self._window)

    def __reduce__(self):  # without what is cached
        return BlockShuffle, (self._blocks, self._length, self._together, self._seed)

    def __getitem__(self, place: int) -> int:
        epoch, place = divmod(place, self._length)
        _, starts = self._epoch(epoch)
        window, place = find(starts, place)
        return int(self._window(epoch, window)[place])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the blocks, and the first place of each window of them."""
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._blocks))
        ends = np.cumsum(self._sizes[order])
        return order, np.concatenate([[0], ends[self._together - 1 : -1 : self._together]])

    def _window(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._epoch(epoch)
        chosen = order[window * self._together : (window + 1) * self._together]
        records = np.concatenate([np.arange(self._sizes[b]) + self._blocks[b] for b in chosen])
        return np.random.default_rng((self._seed, epoch, window)).permutation(records)
