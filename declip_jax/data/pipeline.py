"""From a source to batches of NumPy arrays: shuffled and augmented to train, in order to evaluate.

The training stream is an endless sequence of samples, a new permutation of the source each epoch.
Sample number n is a function of the seed, the source and n alone: not of the batch size, the number
of processes, or where a run was interrupted.
"""

import functools
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
from declip_jax.data.text import augment, check_eda, load_synonyms, mask_tokens
from declip_jax.data.tokenizer import EOT, tokenize

TEXT_VIEWS = (
    "caption",  # one of the image's captions
    "masked",  # the same caption with tokens hidden, see `mask_tokens`
    "augmented",  # the same caption with words changed, see `augment`
    "synthetic",  # one of the image's synthetic captions
)


def train_batches(
    source: Source,
    *,
    image_views: Sequence[Any],
    text_views: Sequence[str],
    resolution: int,
    context: int,
    batch_size: int,
    seed: int,
    token_lengths: Sequence[int] = (),
    mask_rate: float = 0.15,
    eda: Sequence[str] = ("swap", "delete"),
    synonyms: str = "",
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
      text_views: T different names of TEXT_VIEWS.
      resolution: R, pixels.
      context: tokens of the longest caption.
      batch_size: samples a step, over all shards together.
      seed: of the order and of all that is drawn.
      token_lengths: even numbers, ascending. L is the first of these below the context that holds
        all captions of the batch, else the context made even; with several shards always the
        latter, because none knows the captions of the others. (): L is the context as it is.
      mask_rate: share of the tokens that "masked" chooses.
      eda: operations of `augment`, of which "augmented" draws one for each caption.
      synonyms: file that `prepare synonyms` wrote, for "synonym" in `eda`.
      start_sample: samples used before; the first batch starts with this one.
      shard: (index, count): this process' part of every batch.
      workers: processes that make batches; 0 makes them in threads of this process.
      threads: images decoded at a time, in each process.
      prefetch: batches made ahead, in each process; at least 2.

    Returns:
      A generator of {"image": uint8 [B, V, R, R, 3], "tokens": int32 [B, T, L]} and, with the text
      view "masked", "mlm_labels": int32 [B, L], see `mask_tokens`; B = batch_size / count.

    Raises:
      ValueError: an empty source, one without the synthetic captions or the synonyms that a text
        view needs, an unknown text view, a number out of range, or a batch size that does not
        divide by the number of shards; while it runs, a record that cannot be read, by source,
        index and key.
      RuntimeError: while it runs, a worker that was killed.
    """
    if not set(text_views) <= set(TEXT_VIEWS) or len(set(text_views)) < len(text_views):
        raise ValueError(f"text views {tuple(text_views)} must be different ones of {TEXT_VIEWS}.")
    if not len(source):
        raise ValueError(f"{source} is empty.")
    if "synthetic" in text_views and "synthetic" not in source[0]:
        raise ValueError(
            f"{source} has no synthetic captions, which this method learns from: prepare the data "
            "set again with --synthetic-column, --synthetic-field or --synthetic-template."
        )
    if "augmented" in text_views:
        check_eda(eda, synonyms)
    uses_synonyms = "augmented" in text_views and "synonym" in eda
    if not 0 <= mask_rate <= 1:
        raise ValueError(f"config.data.mask_rate={mask_rate} must lie in 0 … 1.")
    ascending = list(token_lengths) == sorted(set(token_lengths))
    if not ascending or any(length < 4 or length % 2 for length in token_lengths):
        raise ValueError(
            f"config.data.token_lengths={tuple(token_lengths)} must be even numbers of at least 4, "
            "each larger than the one before, or () to keep all batches as long as the context."
        )
    least = {"seed": (seed, 0), "workers": (workers, 0), "threads": (threads, 1)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}.")
    index, count = shard
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} does not divide by the {count} processes.")
    full_length = context + (context % 2 if token_lengths else 0)
    lengths = [*(n for n in token_lengths if n < context and count == 1), full_length]
    if not flags.FLAGS.is_parsed():  # outside of absl.app.run; grain reads its own flags
        flags.FLAGS.mark_as_parsed()

    def make_batch(samples: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        shape = (len(samples), len(image_views), resolution, resolution, 3)
        images = np.empty(shape, np.uint8)
        synonyms_of = load_synonyms(synonyms) if uses_synonyms else {}

        def fill(row: int, record: dict[str, Any]) -> tuple[list[str], np.random.Generator]:
            rng = np.random.default_rng((seed, samples[row][0]))
            images[row] = random_resized_crop(record["image"], image_views, rng, resolution)
            caption = _draw(record["captions"], rng)
            texts = {"caption": caption, "masked": caption}
            if "augmented" in text_views:
                texts["augmented"] = augment(caption, eda, synonyms_of, rng)
            if "synthetic" in text_views:
                texts["synthetic"] = _draw(record["synthetic"], rng)
            return [texts[name] for name in text_views], rng

        rows = _map_records(fill, source, [record for _, record in samples], threads)
        tokens = np.zeros((len(samples), len(text_views), full_length), np.int32)
        ids = tokenize([text for texts, _ in rows for text in texts], context)
        tokens[..., :context] = ids.reshape(*tokens.shape[:2], context)  # [B * T, …] -> [B, T, …]
        longest = 1 + (tokens == EOT).argmax(-1).max()
        tokens = tokens[..., : next(n for n in lengths if n >= longest)]
        batch = {"image": images, "tokens": tokens}
        if "masked" in text_views:
            masked = tokens[:, text_views.index("masked")]  # [B, L], a view
            batch["mlm_labels"] = np.empty_like(masked)
            for row, (_, rng) in enumerate(rows):
                masked[row], batch["mlm_labels"][row] = mask_tokens(masked[row], mask_rate, rng)
        return batch

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
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=prefetch))
        .mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
            worker_init_fn=_ignore_interrupts if workers else None,
        )
    )
    return _iterate(dataset)


def _draw(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[rng.integers(len(texts))]


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
