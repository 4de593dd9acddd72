import pickle

import numpy as np
import pytest

from declip_jax.data.order import BlockShuffle, Order
from declip_jax.data.sources import Mixture, Source


class Fake(Source):
    def __init__(self, length, blocks=None, together=1, name="fake"):
        self._length, self._name = length, name
        self.blocks, self.blocks_together = blocks, together

    def __str__(self):
        return self._name

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return {"captions": [f"{self._name} {index}"]}


def first(order, count, start=0):
    return [order[sample] for sample in range(start, start + count)]


def test_one_source():
    order = first(Order(Fake(7), seed=3), 28)
    epochs = [tuple(order[i : i + 7]) for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) == 4
    assert order != first(Order(Fake(7), seed=4), 28)


def test_a_mixture_has_each_source_by_its_weight():
    # Not smaller ones: grain's permutation of a few records takes milliseconds a record.
    order = Order(Mixture([Fake(1000), Fake(70), Fake(200)], [0.5, 0.2, 0.3]), seed=0)
    samples = np.array(first(order, 10_000))
    numbers = np.searchsorted([1000, 1070], samples, side="right")
    # Exactly after 10,000 samples, and nearly in any stretch.
    assert np.bincount(numbers).tolist() == [5000, 2000, 3000]
    for begin in range(0, 10_000, 1000):
        assert np.allclose(np.bincount(numbers[begin : begin + 1000]), [500, 200, 300], atol=70)
    # Each source goes through its own epochs, none of its records left out.
    for number, (low, length) in enumerate(((0, 1000), (1000, 70), (1070, 200))):
        own = samples[numbers == number] - low
        whole = own[: len(own) // length * length].reshape(-1, length)
        assert (np.sort(whole) == np.arange(length)).all()
        assert len({tuple(epoch) for epoch in whole}) == len(whole) >= 5
    # Sources of one length are shuffled differently.
    order = Order(Mixture([Fake(50), Fake(50)], [1, 1]), seed=0)
    samples = np.array(first(order, 400))
    assert (samples[samples < 50][:50] != samples[samples >= 50][:50] - 50).any()


def test_a_mixture_is_found_at_any_sample():
    mixture = Mixture([Fake(1000), Fake(77)], [3, 1])
    order = Order(mixture, seed=5)
    far = 10**13 + 4567
    assert first(order, 50, far) == [Order(mixture, seed=5)[far + i] for i in range(50)]
    assert first(order, 20_000)[9_990:10_050] == first(Order(mixture, seed=5), 60, 9_990)


def test_weights_are_kept_to_four_digits():
    assert Mixture([Fake(1)] * 3, [1, 1, 1]).slots.tolist() == [3334, 3333, 3333]
    assert Mixture([Fake(1)] * 2, [1e-4, 1]).slots.tolist() == [1, 9999]
    for weights in ([1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1e-6]):
        with pytest.raises(ValueError, match="weights"):
            Mixture([Fake(1)] * 2, weights)


def test_a_replacement_is_of_the_same_source():
    mixture = Mixture([Fake(100), Fake(50)], [1, 1])
    order = Order(mixture, seed=0)
    for sample in range(200):
        found = [order.replacement(sample, attempt) for attempt in range(1, 6)]
        assert all((index >= 100) == (order[sample] >= 100) for index in found)
        assert len(set(found)) > 1
    assert order.replacement(3, 1) == Order(mixture, seed=0).replacement(3, 1)


BLOCKS = np.array([0, 5, 5, 12, 40, 41])  # of 50 records; one block is empty


@pytest.mark.parametrize("together", [1, 2, 3, 6, 10])
def test_blocks_are_shuffled_a_few_at_a_time(together):
    shuffle = BlockShuffle(BLOCKS, 50, together, seed=0)
    order = [shuffle[place] for place in range(200)]
    epochs = [order[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for epoch in epochs:
        blocks = np.searchsorted(BLOCKS, epoch, side="right") - 1
        # From the first record of a block to its last, few others are begun.
        for block in set(blocks):
            places = np.flatnonzero(blocks == block)
            assert len(set(blocks[places[0] : places[-1] + 1])) <= together
    if together > 1:
        assert any(np.diff(np.searchsorted(BLOCKS, epochs[0], side="right")).astype(bool)[:5])


def test_blocks_are_found_at_any_place_and_can_be_pickled():
    shuffle = BlockShuffle(BLOCKS, 50, 2, seed=1)
    far = 50 * 10**9 + 17
    expected = [shuffle[far + place] for place in range(100)]
    other = pickle.loads(pickle.dumps(shuffle))
    assert [other[far + place] for place in reversed(range(100))] == expected[::-1]
    assert expected != [BlockShuffle(BLOCKS, 50, 2, seed=2)[far + place] for place in range(100)]


def test_a_source_with_blocks_is_shuffled_by_them():
    order = first(Order(Fake(50, BLOCKS, 2), seed=0), 50)
    assert order == [BlockShuffle(BLOCKS, 50, 2, seed=0)[place] for place in range(50)]
