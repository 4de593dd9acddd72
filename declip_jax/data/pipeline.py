"""From a source to batches of NumPy arrays: shuffled and augmented to train, in order to evaluate.

The training stream is an endless sequence of samples, a new permutation of the source each epoch.
Sample number n is a function of the seed, the source and n alone: not of the batch size, the number
of processes, or where a run was interrupted.
"""

import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags

from declip_jax.data.image import random_resized_crop, resize_centre_crop
from declip_jax.data.sources import Source
from declip_jax.data.tokenizer import tokenize


def _caption(record: dict[str, Any], rng: np.random.Generator) -> str:
    return record["captions"][rng.integers(len(record["captions"]))]


# What a text view can be: (record, rng) -> str.
TEXT_VIEWS: dict[str, Callable[[dict[str, Any], np.random.Generator], str]] = {
    "caption": _caption,  # one of the image's captions
}


def train_batches(
    source: Source,
    *,
    image_views: Sequence[Any],
    text_views: Sequence[str],
    resolution: int,
    context: int,
    batch_size: int,
    seed: int,
    start_sample: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    threads: int = 16,
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end, made ahead of use. Close it in the end; after an error it has ended.

    A batch may cross the end of an epoch: no record is left out, and a source smaller than a batch
    comes more than once in it.

    Args:
      source: where the records come from.
      image_views: V objects with the crop_scale and crop_ratio of `random_resized_crop`.
      text_views: T names of TEXT_VIEWS.
      resolution: R, pixels.
      context: L, tokens.
      batch_size: samples a step, over all shards together.
      seed: of the order and of all that is drawn.
      start_sample: samples used before; the first batch starts with this one.
      shard: (index, count): this process' part of every batch.
      workers: processes that make batches; 0 makes them in threads of this process.
      threads: images decoded at a time, in each process.
      prefetch: batches made ahead, in each process; at least 2.

    Returns:
      A generator of {"image": uint8 [B, V, R, R, 3], "tokens": int32 [B, T, L]}, B = batch_size /
      count.

    Raises:
      ValueError: an empty source, an unknown text view, a number out of range, or a batch size that
        does not divide by the number of shards; while it runs, a record that cannot be read, by
        source, index and key.
      RuntimeError: while it runs, a worker that was killed.
    """
    unknown = sorted(set(text_views) - set(TEXT_VIEWS))
    if unknown:
        raise ValueError(f"text views {unknown} are unknown: expected {sorted(TEXT_VIEWS)}.")
    if not len(source):
        raise ValueError(f"{source} is empty.")
    least = {"seed": (seed, 0), "workers": (workers, 0), "threads": (threads, 1)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}.")
    index, count = shard
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} does not divide by the {count} processes.")
    if not flags.FLAGS.is_parsed():  # outside of absl.app.run; grain reads its own flags
        flags.FLAGS.mark_as_parsed()

    def make_batch(samples: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        shape = (len(samples), len(image_views), resolution, resolution, 3)
        images = np.empty(shape, np.uint8)

        def fill(row: int, record: dict[str, Any]) -> list[str]:
            rng = np.random.default_rng((seed, samples[row][0]))
            images[row] = random_resized_crop(record["image"], image_views, rng, resolution)
            return [TEXT_VIEWS[name](record, rng) for name in text_views]

        texts = _map_records(fill, source, [record for _, record in samples], threads)
        tokens = tokenize(list(itertools.chain.from_iterable(texts)), context)
        # [B * T, L] -> [B, T, L]
        return {"image": images, "tokens": tokens.reshape(len(samples), len(text_views), context)}

    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .map_with_index(lambda sample, record: (sample, record))
        # After the repetition: a source that does not divide by the number of shards would give
        # them epochs of different lengths, and they would drift apart.
        .slice(slice(start_sample + index, None, count))
        .batch(batch_size // count, drop_remainder=True, batch_fn=list)
        .map(make_batch)
        # Two batches at a time: one has images to decode when the other runs out of them.
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(2, prefetch)))
        .mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
            worker_init_fn=_ignore_interrupts if workers else None,
        )
    )
    return _iterate(dataset)


def _ignore_interrupts(index: int, count: int) -> None:
    # A terminal sends Ctrl-C to all processes; the main one decides, and still needs its batches.
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def eval_images(
    source: Source, *, resolution: int, resize: int, batch_size: int, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """All records in order, in batches made ahead of use; the last may be smaller.

    Args:
      source: where the records come from.
      resolution: R, pixels.
      resize: the short side before the centre crop, pixels.
      batch_size: B, records.
      most: at most so many records, spread evenly over the source; all of them if None.

    Returns:
      A generator of {"image": uint8 [B, R, R, 3], "captions": B lists of str, "key": B str} and, if
      the source has classes, "label": int32 [B].

    Raises:
      ValueError: `resize` below `resolution`; while it runs, a record that cannot be read.
    """
    if resize < resolution:
        raise ValueError(f"resize={resize} is below the resolution {resolution} of the crop.")

    count = min(most or len(source), len(source))

    def make_batch(places: Sequence[int]) -> dict[str, Any]:
        indices = [place * len(source) // count for place in places]
        images = np.empty((len(indices), resolution, resolution, 3), np.uint8)

        def fill(row: int, record: dict[str, Any]) -> dict[str, Any]:
            images[row] = resize_centre_crop(record["image"], resize, resolution)
            return {name: value for name, value in record.items() if name != "image"}

        rows = _map_records(fill, source, indices, threads=os.cpu_count())
        batch = {"image": images}
        batch["captions"] = [row["captions"] for row in rows]
        batch["key"] = [row["key"] for row in rows]
        if source.class_names:
            batch["label"] = np.array([row["label"] for row in rows], np.int32)
        return batch

    dataset = (
        grain.MapDataset.range(count)
        .batch(batch_size, batch_fn=list)
        .map(make_batch)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    )
    return _iterate(dataset)


def _map_records(
    function: Callable[[int, dict[str, Any]], Any],
    source: Source,
    indices: Sequence[int],
    threads: int,
) -> list:
    """[function(0, source[indices[0]]), function(1, source[indices[1]]), ...], many at a time."""

    def call(row: int, index: int):
        key = None
        try:
            record = source[index]
            key = record["key"]
            return function(row, record)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"record {index} (key {key!r}) of {source} cannot be read: {error}. Prepare the "
                "data set again; records that cannot be decoded are then left out."
            ) from error

    return list(_pool(threads).map(call, range(len(indices)), indices))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # One in each process. The decoders and resizing release the GIL.
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


def _iterate(dataset: grain.IterDataset) -> Iterator[dict[str, Any]]:
    batches = iter(dataset)
    try:
        yield from batches
    finally:
        batches.close()
