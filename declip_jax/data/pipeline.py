"""From a source to batches of NumPy arrays: shuffled and augmented to train, in order to evaluate.

The training stream is an endless sequence of samples, a new permutation of the source each epoch.
Sample number n is a function of the seed, the source and n alone: not of the batch size, the number
of processes, or where a run was interrupted.
"""

import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from declip_jax.data.image import random_resized_crop, resize_center_crop
from declip_jax.data.order import Order
from declip_jax.data.records import BadRecord
from declip_jax.data.reports import BadRecords, Busy, InHand, Report
from declip_jax.data.sources import Mixture, Source
from declip_jax.data.text import augment, check_eda, load_synonyms, mask_tokens
from declip_jax.data.tokenizer import EOT, tokenize

_ATTEMPTS = 10  # records tried for a sample, each in place of one that cannot be used

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
    threads: int = 0,
    prefetch: int = 4,
    max_bad_fraction: float = 0.01,
    bad_window: int = 10_000,
    log: Callable[[str], Any] = print,
) -> "TrainBatches":
    """Batches without end, made ahead of use.

    A batch may cross the end of an epoch: no record is left out, and a source smaller than a batch
    comes more than once in it. A record that cannot be used is replaced by another of the same
    source, which follows from the seed and the sample's number.

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
      threads: images read and decoded at a time, in each process; 0: a few more than its share of
        the cores, for more would only wait for each other.
      prefetch: batches made ahead, in each process; at least 2.
      max_bad_fraction: the stream ends with an error if more records than this share of the last
        `bad_window` samples had to be replaced.
      bad_window: samples.
      log: takes lines for the user: the first records that had to be replaced.

    Returns:
      An iterator of {"image": uint8 [B, V, R, R, 3], "tokens": int32 [B, T, L]} and, with the text
      view "masked", "mlm_labels": int32 [B, L], see `mask_tokens`; B = batch_size / count. Shards,
      one after the other, are the whole batch.

    Raises:
      ValueError: an empty source, one without the synthetic captions or the synonyms that a text
        view needs, an unknown text view, a number out of range, or a batch size that does not
        divide by the number of shards.
    """
    if not set(text_views) <= set(TEXT_VIEWS) or len(set(text_views)) < len(text_views):
        raise ValueError(f"text views {tuple(text_views)} must be different ones of {TEXT_VIEWS}.")
    if not len(source):
        raise ValueError(f"{source} is empty.")
    if "synthetic" in text_views:
        for part in source.sources if isinstance(source, Mixture) else (source,):
            _check_synthetic(part)
    if "augmented" in text_views:
        check_eda(eda, synonyms)
    if not 0 <= mask_rate <= 1:
        raise ValueError(f"config.data.mask_rate={mask_rate} must lie in 0 … 1.")
    ascending = list(token_lengths) == sorted(set(token_lengths))
    if not ascending or any(length < 4 or length % 2 for length in token_lengths):
        raise ValueError(
            f"config.data.token_lengths={tuple(token_lengths)} must be even numbers of at least 4, "
            "each larger than the one before, or () to keep all batches as long as the context."
        )
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"config.data.max_bad_fraction={max_bad_fraction} must lie in 0 … 1.")
    least = {"seed": (seed, 0), "workers": (workers, 0), "threads": (threads, 0)}
    least["bad_window"] = (bad_window, 1)
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}.")
    part, count = shard
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} does not divide by the {count} processes.")
    full_length = context + (context % 2 if token_lengths else 0)
    lengths = [*(n for n in token_lengths if n < context and count == 1), full_length]
    if not flags.FLAGS.is_parsed():  # outside of absl.app.run; grain reads its own flags
        flags.FLAGS.mark_as_parsed()

    threads = threads or cores() // max(1, workers) + 2
    share = batch_size // count
    in_hand = InHand(threads) if workers else None
    samples = Samples(
        source,
        seed,
        image_views=image_views,
        text_views=text_views,
        eda=eda,
        synonyms=synonyms,
        in_hand=in_hand,
    )

    def make_batch(step: int) -> tuple[dict[str, np.ndarray], Report]:
        first = start_sample + step * batch_size + part * share
        images = np.empty((share, len(image_views), resolution, resolution, 3), np.uint8)

        with _busy():
            numbers = range(first, first + share)
            rows = list(_pool(threads).map(samples.draw, numbers, images))
            ids = tokenize([text for row in rows for text in row.texts], context)
            tokens = np.zeros((share, len(text_views), full_length), np.int32)
            ids = ids.reshape(share, len(text_views), context)  # [B * T, …] -> [B, T, …]
            tokens[..., :context] = ids
            longest = 1 + (tokens == EOT).argmax(-1).max()
            tokens = tokens[..., : next(n for n in lengths if n >= longest)]
            batch = {"image": images, "tokens": tokens}
            if "masked" in text_views:
                masked = tokens[:, text_views.index("masked")]  # [B, L], a view
                batch["mlm_labels"] = np.empty_like(masked)
                for i, row in enumerate(rows):
                    masked[i], batch["mlm_labels"][i] = mask_tokens(masked[i], mask_rate, row.rng)
            bad = sorted(one for row in rows for one in row.bad)
            return batch, Report(bad, _busy().take(), sum(row.image_bytes for row in rows))

    dataset = (
        grain.MapDataset.range((sys.maxsize - start_sample) // batch_size)
        .map(make_batch)
        # Two batches at a time: one has images to decode when the other runs out of them.
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=prefetch))
        .mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
            worker_init_fn=_start_worker if workers else None,
        )
    )
    bad_records = BadRecords(source, max_bad_fraction, bad_window, log)
    return TrainBatches(dataset, source, bad_records, in_hand, processes=max(workers, 1) * count)


class Sample(NamedTuple):
    """What `Samples.draw` gives beside the images.

    Attributes:
      texts: of the text views, in their order; "masked" is still whole.
      rng: from which the tokens that "masked" hides are drawn next.
      image_bytes: size of the encoded image.
      bad: (index, reason, message) of records that could not be used.
    """

    texts: list[str]
    rng: np.random.Generator
    image_bytes: int
    bad: list[tuple[int, str, str]]


class Samples:
    """Sample number -> its images and texts, a function of the seed, the source and the number.

    Args:
      source, seed, image_views, text_views, eda, synonyms: see `train_batches`.
      in_hand: told which records are being read.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        *,
        image_views: Sequence[Any],
        text_views: Sequence[str],
        eda: Sequence[str],
        synonyms: str,
        in_hand: InHand | None = None,
    ):
        self._source, self._seed, self._order = source, seed, Order(source, seed)
        self._image_views, self._text_views = image_views, text_views
        self._eda = eda
        # A file, and not what it holds: workers are sent this object, and read the file once each.
        self._synonyms = synonyms if "augmented" in text_views and "synonym" in eda else ""
        self._in_hand = in_hand

    def draw(self, number: int, images: np.ndarray) -> Sample:
        """Fills uint8 `images` [V, R, R, 3] with the sample's views, and returns its texts.

        Raises:
          ValueError: neither its record nor those in place of it can be used, or reading one failed
            for a reason that may pass.
        """
        source, bad = self._source, []
        synonyms = load_synonyms(self._synonyms) if self._synonyms else {}
        for attempt in range(_ATTEMPTS):
            index = self._order.replacement(number, attempt) if attempt else self._order[number]
            rng = np.random.default_rng((self._seed, number))
            try:
                with self._in_hand(index) if self._in_hand else contextlib.nullcontext():
                    record = source[index]
                    image = record["image"]
                    images[:] = random_resized_crop(image, self._image_views, rng, images.shape[1])
                    caption = _draw(record["captions"], rng)
                    texts = {"caption": caption, "masked": caption}
                    if "augmented" in self._text_views:
                        texts["augmented"] = augment(caption, self._eda, synonyms, rng)
                    if "synthetic" in self._text_views:
                        texts["synthetic"] = _draw(record["synthetic"], rng)
            except ValueError as error:
                reason = error.reason if isinstance(error, BadRecord) else "unreadable image"
                bad.append((index, reason, str(error)))
                continue
            except Exception as error:
                raise ValueError(
                    f"{source.locate(index)}: reading it failed with {error!r}."
                ) from error
            size = len(image) if isinstance(image, bytes) else image.nbytes
            return Sample([texts[name] for name in self._text_views], rng, size, bad)
        raise ValueError(
            f"{_ATTEMPTS} records of {source} in a row cannot be used, the last of them "
            f"{source.locate(index)}: {bad[-1][-1]}."
        )


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """The batches of `train_batches`. Close it in the end; after an error it has ended.

    Iterating raises ValueError for too many records that cannot be used, for one that the file
    system does not give, and for a worker that was killed, with the records that it had in hand.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        source: Source,
        bad: BadRecords,
        in_hand: InHand | None,
        processes: int,
    ):
        self._batches = _iterate(dataset)  # starts nothing yet
        self._source, self._bad, self._in_hand, self._processes = source, bad, in_hand, processes
        self._reports: list[tuple[int, Report]] = []

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch, report = next(self._batches)
        except RuntimeError as error:
            lost = self._in_hand.of_dead_workers() if self._in_hand else []
            if not lost:
                raise
            places = "; ".join(self._source.locate(index) for index in lost)
            raise ValueError(
                f"{error} It had in hand: {places}. If memory ran out, use fewer "
                "config.data.workers or config.data.threads; else one of these records crashes the "
                "decoder: prepare the data without it."
            ) from error
        samples = len(batch["image"])
        self._reports.append((samples, report))
        try:
            self._bad.add(samples, report.bad)
        except ValueError:
            self.close()
            raise
        return batch

    def metrics(self) -> dict[str, float]:
        """Of the batches since the last call, in this process' share of them.

        Returns:
          data/pairs_per_s: what the pipeline makes while it works, over all processes.
          data/image_bytes: mean size of an encoded image.
          data/bad_share: records that had to be replaced, and data/bad/<reason>: how many.
        """
        if not self._reports:
            return {}
        samples = sum(count for count, _ in self._reports)
        reports = [report for _, report in self._reports]
        reasons = Counter(
            reason.replace(" ", "_") for report in reports for _, reason, _ in report.bad
        )
        self._reports = []
        return {
            "data/pairs_per_s": samples / sum(r.seconds for r in reports) * self._processes,
            "data/image_bytes": sum(r.image_bytes for r in reports) / samples,
            "data/bad_share": reasons.total() / samples,
            **{f"data/bad/{reason}": count for reason, count in reasons.items()},
        }

    def close(self) -> None:
        self._batches.close()
        if self._in_hand:
            self._in_hand.close()


def digest(source: Source) -> str:
    """Changes with the data; what sample number n is follows from them."""
    layout = json.dumps(source.layout()).encode()
    return hashlib.blake2b(layout, digest_size=16).hexdigest()


def _check_synthetic(source: Source) -> None:
    for index in range(min(len(source), _ATTEMPTS)):
        with contextlib.suppress(BadRecord):
            if "synthetic" in source[index]:
                return
            raise ValueError(
                f"{source} has no synthetic captions, which this method learns from: name them in "
                "config.data.columns.synthetic, or prepare the data set again with "
                "--synthetic-column, --synthetic-field or --synthetic-template, or with python -m "
                "declip_jax.prepare captions."
            )


def _draw(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[rng.integers(len(texts))]


def _start_worker(index: int, count: int) -> None:
    del index, count
    # A terminal sends Ctrl-C to all processes; the main one decides, and still needs its batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()


def eval_images(
    source: Source, *, resolution: int, resize: int, batch_size: int, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """All records in order, in batches made ahead of use; the last may be smaller.

    Args:
      source: where the records come from.
      resolution: R, pixels.
      resize: the short side before the center crop, pixels.
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

        def fill(row: int, index: int) -> dict[str, Any]:
            try:
                record = source[index]
                images[row] = resize_center_crop(record["image"], resize, resolution)
            except ValueError as error:
                raise ValueError(
                    f"{source.locate(index)} cannot be read: {error}. Evaluation needs every "
                    "record: prepare the data with python -m declip_jax.prepare, which leaves out "
                    "what cannot be decoded."
                ) from error
            return {name: value for name, value in record.items() if name != "image"}

        rows = list(_pool(cores()).map(fill, range(len(indices)), indices))
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


def cores() -> int:
    """That this process may use."""
    # Not on all systems can a process be held to some.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # One in each process. The decoders and resizing release the GIL.
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


@functools.cache
def _busy() -> Busy:
    return Busy()  # of this process


def _iterate(dataset: grain.IterDataset) -> Iterator[dict[str, Any]]:
    batches = iter(dataset)
    try:
        yield from batches
    finally:
        batches.close()
