"""From a source to batches to train on, NumPy arrays: shuffled, cropped, and as tokens.

The training stream is an endless sequence of samples, a new permutation of the source each epoch.
Sample number n is a function of the seed, the source and n alone: not of the batch size, the number
of processes, or where a run was interrupted.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from declip_jax import digests
from declip_jax.data.image import random_resized_crop
from declip_jax.data.options import Data
from declip_jax.data.order import Order
from declip_jax.data.parallel import cores, follow_parent, iterate, pool
from declip_jax.data.records import BadRecord
from declip_jax.data.reports import BadRecords, Busy, InHand, Report
from declip_jax.data.sources import Mixture, Source
from declip_jax.data.sources.base import first_record
from declip_jax.data.text import augment, load_synonyms, mask_tokens
from declip_jax.data.tokenizer import Tokenizer

_ATTEMPTS = 10  # records tried for a sample, each in place of one that cannot be used

TEXT_VIEWS = (
    "caption",  # one of the image's captions
    "masked",  # the same caption with tokens hidden, see `mask_tokens`
    "augmented",  # the same caption with words changed, see `augment`
    "synthetic",  # one of the image's synthetic captions
)


def train_batches(
    source: Source,
    data: Data,
    *,
    image_views: Sequence[Any],
    text_views: Sequence[str],
    resolution: int,
    context: int,
    batch_size: int,
    seed: int,
    tokenizer: Tokenizer,
    start_sample: int = 0,
    shard: tuple[int, int] = (0, 1),
    padded: bool = False,
    log: Callable[[str], Any] = print,
) -> "TrainBatches":
    """Batches without end, made ahead of use.

    A batch may cross the end of an epoch: no record is left out, and a source smaller than a batch
    comes more than once in it. A record that cannot be used is replaced by another of its source.

    Args:
      data: how the source is read; what it says of sources is not heeded here.
      image_views: V objects with the crop_scale and crop_ratio of `random_resized_crop`.
      text_views: T different names of TEXT_VIEWS.
      resolution: R, pixels.
      context: tokens of the longest caption.
      batch_size: samples a step, over all shards together.
      seed: of the order and of all that is drawn.
      start_sample: samples used before; the first batch starts with this one.
      shard: (index, count): this process' part of every batch.
      padded: L is the context as it is. Otherwise it is the first of `data.token_lengths` below the
        context that holds all captions of the batch, else the context made even; with several
        shards always the latter, because none knows the captions of the others.
      log: takes lines for the user: the first records that had to be replaced.

    Returns:
      An iterator of {"image": uint8 [B, V, R, R, 3], "tokens": int32 [B, T, L]} and, with the text
      view "masked", "mlm_labels": int32 [B, L], see `mask_tokens`; B = batch_size / count. Shards,
      one after the other, are the whole batch.

    Raises:
      ValueError: an empty source, one without the synthetic captions or the synonyms that a text
        view needs, an unknown text view, a negative seed, or a batch size that does not divide by
        the number of shards.
    """
    if not set(text_views) <= set(TEXT_VIEWS) or len(set(text_views)) < len(text_views):
        raise ValueError(f"text views {tuple(text_views)} must be different ones of {TEXT_VIEWS}.")
    if not len(source):
        raise ValueError(f"{source} is empty.")
    if "synthetic" in text_views:
        for part in source.sources if isinstance(source, Mixture) else (source,):
            record = first_record(part)
            if record is not None and "synthetic" not in record:
                raise ValueError(
                    f"{part} has no synthetic captions, which this method learns from: name them "
                    "in config.data.columns.synthetic, or prepare the data set again with "
                    "--synthetic-column, --synthetic-field or --synthetic-template, or with python "
                    "-m declip_jax.prepare captions."
                )
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0.")
    part, count = shard
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} does not divide by the {count} processes.")
    token_lengths = () if padded else data.token_lengths
    full_length = context + (context % 2 if token_lengths else 0)
    lengths = [*(n for n in token_lengths if n < context and count == 1), full_length]
    if not flags.FLAGS.is_parsed():  # outside of absl.app.run; grain reads its own flags
        flags.FLAGS.mark_as_parsed()

    threads = data.threads or cores() // max(1, data.workers) + 2
    share = batch_size // count
    in_hand = InHand() if data.workers else None
    samples = Samples(source, data, seed, image_views, text_views, tokenizer, in_hand)

    def make_batch(step: int) -> tuple[dict[str, np.ndarray], Report]:
        first = start_sample + step * batch_size + part * share
        images = np.empty((share, len(image_views), resolution, resolution, 3), np.uint8)

        with _busy():
            numbers = range(first, first + share)
            rows = list(pool(threads).map(samples.draw, numbers, images))
            ids = tokenizer.encode([text for row in rows for text in row.texts], context)
            tokens = np.zeros((share, len(text_views), full_length), np.int32)
            ids = ids.reshape(share, len(text_views), context)  # [B * T, …] -> [B, T, …]
            tokens[..., :context] = ids
            longest = 1 + (tokens == tokenizer.end).argmax(-1).max()
            tokens = tokens[..., : next(n for n in lengths if n >= longest)]
            batch = {"image": images, "tokens": tokens}
            if "masked" in text_views:
                masked = tokens[:, text_views.index("masked")]  # [B, L], a view
                batch["mlm_labels"] = np.empty_like(masked)
                for i, row in enumerate(rows):
                    masked[i], batch["mlm_labels"][i] = mask_tokens(
                        masked[i], data.mask_rate, tokenizer, row.rng
                    )
            bad = sorted(one for row in rows for one in row.bad)
            return batch, Report(bad, _busy().take(), sum(row.image_bytes for row in rows))

    dataset = (
        grain.MapDataset.range((sys.maxsize - start_sample) // batch_size)
        .map(make_batch)
        # Two batches at a time: one has images to decode when the other runs out of them.
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=data.prefetch))
        .mp_prefetch(
            grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=1),
            worker_init_fn=_start_worker if data.workers else None,
        )
    )
    bad_records = BadRecords(source, data.max_bad_fraction, data.bad_window, log)
    processes = max(data.workers, 1) * count
    return TrainBatches(iterate(dataset), source, bad_records, in_hand, processes)


class Sample(NamedTuple):
    """What `Samples.draw` gives beside the images."""

    texts: list[str]  # of the text views, in their order; "masked" is still whole
    rng: np.random.Generator  # from which the tokens that "masked" hides are drawn next
    image_bytes: int  # encoded
    bad: list[tuple[int, str, str]]  # index, reason and message of records that cannot be used


@dataclasses.dataclass
class Samples:
    """Sample number -> its images and texts, a function of the seed, the source and the number.

    What is not told here is as for `train_batches`. Raises ValueError if there is no file of the
    synonyms that a text view needs.
    """

    source: Source
    data: Data
    seed: int
    image_views: Sequence[Any]
    text_views: Sequence[str]
    tokenizer: Tokenizer
    in_hand: InHand | None = None  # told which records are being read

    def __post_init__(self):
        self._order = Order(self.source, self.seed)
        self._synonyms()

    def _synonyms(self) -> dict[str, list[str]]:
        # Not kept here: workers are sent this object, and read the file once each.
        replaces_words = "augmented" in self.text_views and "synonym" in self.data.eda
        return load_synonyms(self.data.synonyms) if replaces_words else {}

    def draw(self, number: int, images: np.ndarray) -> Sample:
        """Fills uint8 `images` [V, R, R, 3] with the sample's views, and returns its texts.

        Raises ValueError if neither its record nor those in place of it can be used, or reading one
        failed for a reason that may pass.
        """
        source, bad, synonyms = self.source, [], self._synonyms()
        for attempt in range(_ATTEMPTS):
            index = self._order.replacement(number, attempt) if attempt else self._order[number]
            rng = np.random.default_rng((self.seed, number))
            try:
                with self.in_hand(index) if self.in_hand else contextlib.nullcontext():
                    record = source[index]
                    image = record["image"]
                    images[:] = random_resized_crop(image, self.image_views, rng, images.shape[1])
                    caption = _draw(record["captions"], rng)
                    texts = {"caption": caption, "masked": caption}
                    if "augmented" in self.text_views:
                        clean = self.tokenizer.clean(caption)
                        texts["augmented"] = augment(clean, self.data.eda, synonyms, rng)
                    if "synthetic" in self.text_views:
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
            return Sample([texts[name] for name in self.text_views], rng, size, bad)
        raise ValueError(
            f"{_ATTEMPTS} records of {source} in a row cannot be used, the last of them "
            f"{source.locate(index)}: {bad[-1][-1]}."
        )


@dataclasses.dataclass(eq=False)
class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """The batches of `train_batches`. Close it in the end; after an error it has ended.

    Iterating raises ValueError for too many records that cannot be used, for one that the file
    system does not give, and for a worker that was killed, with the records that it had in hand.
    """

    batches: Iterator[tuple[dict[str, np.ndarray], Report]]
    source: Source
    bad: BadRecords
    in_hand: InHand | None
    processes: int  # that make batches, over all shards
    reports: list[tuple[int, Report]] = dataclasses.field(default_factory=list)

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch, report = next(self.batches)
        except RuntimeError as error:
            lost = self.in_hand.of_dead_workers() if self.in_hand else []
            if not lost:
                raise
            places = "; ".join(self.source.locate(index) for index in lost)
            raise ValueError(
                f"{error} It had in hand: {places}. If memory ran out, use fewer "
                "config.data.workers or config.data.threads; else one of these records crashes the "
                "decoder: prepare the data without it."
            ) from error
        samples = len(batch["image"])
        self.reports.append((samples, report))
        try:
            self.bad.add(samples, report.bad)
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
        if not self.reports:
            return {}
        samples = sum(count for count, _ in self.reports)
        reports = [report for _, report in self.reports]
        reasons = Counter(
            reason.replace(" ", "_") for report in reports for _, reason, _ in report.bad
        )
        self.reports = []
        return {
            "data/pairs_per_s": samples / sum(r.seconds for r in reports) * self.processes,
            "data/image_bytes": sum(r.image_bytes for r in reports) / samples,
            "data/bad_share": reasons.total() / samples,
            **{f"data/bad/{reason}": count for reason, count in reasons.items()},
        }

    def close(self) -> None:
        self.batches.close()
        if self.in_hand:
            self.in_hand.close()


def digest(source: Source) -> str:
    """Changes with the data; what sample number n is follows from them."""
    return digests.digest(source.layout())


def _draw(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[rng.integers(len(texts))]


def _start_worker(*_: int) -> None:
    follow_parent()
    faulthandler.enable()


@functools.cache
def _busy() -> Busy:
    return Busy()  # of this process
