"""A picture of what a run trains on: images as augmented, texts as the model reads them."""

import contextlib
import itertools
import textwrap
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from declip_jax.augment import augment
from declip_jax.data.image import decode
from declip_jax.data.order import Order
from declip_jax.data.sources import Source, open_data
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.step import Setup

# Pixels; a letter of text is about LETTER wide.
WIDTH, CELL, GAP, LABEL = 1600, 200, 24, 95
LINE, LETTER = 17, 8.5


class Sample(NamedTuple):
    """A sample of the training data, its views drawn several times.

    Attributes:
      key: of the record.
      original: uint8 [H, W, 3], as decoded.
      images: float [draws, V, R, R, 3] in 0..1: all but normalized.
      texts: for each draw the pairs of title and text, see `read_texts`.
    """

    key: str
    original: np.ndarray
    images: np.ndarray
    texts: list[list[tuple[str, str]]]


class OneRecord(Source):
    """A source of one record of another: the same sample over and over."""

    def __init__(self, source: Source, index: int):
        self._source, self._index = source, index

    def __str__(self) -> str:
        return f"record {self._index} of {self._source}"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._index]

    def locate(self, index: int) -> str:
        return self._source.locate(self._index)


def draw_samples(setup: Setup, records: int, draws: int) -> list[Sample]:
    """The first `records` samples of a run, each drawn `draws` times.

    Raises:
      ValueError: the configuration or the data cannot be used.
    """
    config = setup.config
    names = setup.method.views
    source = open_data(config.data)

    # The order of train_batches. What is drawn for a sample depends on its number alone, so that of
    # a source with one record starts at this number too.
    order = Order(source, config.seed)
    rows = [OneRecord(source, order[number]) for number in range(records)]
    batches = []
    for number, row in enumerate(rows):
        stream = setup.batches(row, start_sample=number, batch_size=draws)
        with contextlib.closing(stream):
            batches.append(next(stream))

    # The keys of make_init and make_train_step, for as many steps as there are draws.
    rng = jax.random.split(jax.random.PRNGKey(config.seed))[1]
    keys = [jax.random.split(jax.random.fold_in(rng, step))[0] for step in range(draws)]
    views = [config.views[name] for name in names.image]
    augment_draw = jax.jit(lambda key, images: augment(key, images, views, mean=0.0, std=1.0))
    images = [  # draws × [records, V, R, R, 3]
        augment_draw(key, np.stack([batch["image"][draw] for batch in batches]))
        for draw, key in enumerate(keys)
    ]
    return [
        Sample(
            key=row[0]["key"],
            original=decode(row[0]["image"]),
            images=pixels,
            texts=[read_texts(batch, draw, names.text) for draw in range(draws)],
        )
        for row, batch, pixels in zip(rows, batches, np.stack(images, axis=1), strict=True)
    ]


def read_texts(batch: dict[str, np.ndarray], row: int, names: tuple[str, ...]) -> list:
    """Pairs of title and text: an example's text views, and what the masked one hides."""
    texts = []
    for name, tokens in zip(names, batch["tokens"][row], strict=True):
        inner = tokens[1 : (tokens == CLIP_TOKENIZER.end).argmax()]
        texts.append((name, CLIP_TOKENIZER.decode(inner)))
        if name == "masked":
            labels = batch["mlm_labels"][row]
            words = [CLIP_TOKENIZER.decode([label]) for label in labels if label >= 0]
            texts.append(("to predict", ", ".join(words) or "(no token was chosen)"))
    return texts


def draw_page(samples: list[Sample], titles: list[str], out: str) -> None:
    """Writes a PNG, 1600 pixels wide, a row for each draw of each sample.

    Args:
      samples: see `draw_samples`; texts may not fit beside more than five image views.
      titles: V + 1, of the image views and of the texts: a name, and lines below it.
      out: where to write.
    """
    draws, views = samples[0].images.shape[:2]
    header = 50 + LINE * max(title.count("\n") + 1 for title in titles)
    height = header + len(samples) * draws * (CELL + GAP)
    figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor="white")

    def place(left: float, top: float) -> tuple[float, float]:
        return left / WIDTH, 1 - top / height

    def write(left: float, top: float, text: str, **style) -> None:
        # Captions are plain text: without parse_math a "$" in one would start a formula.
        figure.text(*place(left, top), text, va="top", parse_math=False, **style)

    def show(left: float, top: float, pixels: np.ndarray) -> None:
        axes: Axes = figure.add_axes(
            (*place(left, top + CELL), CELL / WIDTH, CELL / height), xticks=[], yticks=[]
        )
        axes.imshow(pixels)

    lefts = [GAP + column * (CELL + GAP) for column in range(views + 2)]
    for left, title in zip(lefts, ["original", *titles], strict=True):
        name, _, settings = title.partition("\n")
        write(left, 20, name, size=13, weight="bold")
        write(left, 48, settings, size=9, color="0.4")

    letters = int((WIDTH - GAP - lefts[-1] - LABEL) / LETTER)
    for row, (sample, draw) in enumerate(itertools.product(samples, range(draws))):
        top = header + row * (CELL + GAP)
        if draw == 0:
            show(lefts[0], top, sample.original)
            write(lefts[0], top + CELL + 3, sample.key, size=8, color="0.4")
        for left, pixels in zip(lefts[1:-1], sample.images[draw], strict=True):
            show(left, top, pixels.clip(0, 1))
        write(lefts[-1], top, f"draw {draw + 1}", size=8, color="0.4")
        top += LINE
        most = CELL // LINE // len(sample.texts[draw])
        for title, text in sample.texts[draw]:
            lines = textwrap.wrap(text, letters, max_lines=most, placeholder=" …")
            write(lefts[-1], top, title, size=10, color="0.4")
            write(lefts[-1] + LABEL, top, "\n".join(lines), size=10.5)
            top += LINE * max(1, len(lines)) + 4
    figure.savefig(out, format="png")


def image_title(name: str, view) -> str:
    """Name of an image view, and a line for each operation that it may do."""

    def span(low_high) -> str:
        return "{:.3g}–{:.3g}".format(*low_high)

    lines = [name, f"crop {span(view.crop_scale)}, ratio {span(view.crop_ratio)}"]
    if view.flip:
        lines.append(f"flip p {view.flip}")
    if view.jitter_prob:
        lines.append(f"jitter {'/'.join(map(str, view.jitter))} p {view.jitter_prob}")
    if view.grayscale_prob:
        lines.append(f"gray p {view.grayscale_prob}")
    if view.blur_prob:
        lines.append(f"blur σ {span(view.blur_sigma)} p {view.blur_prob}")
    return "\n".join(lines)


def text_title(names: tuple[str, ...], context: int, data) -> str:
    """The text views, and a line for each thing that is done to them.

    Args:
      names: of the views.
      context: most tokens of a text.
      data: section of the configuration.
    """
    lines = ["text, as the model reads it", f"at most {context} tokens"]
    if "masked" in names:
        lines.append(f"masked: each token p {data.mask_rate}")
    if "augmented" in names:
        lines.append(f"augmented: one of {', '.join(data.eda)}")
    return "\n".join(lines)
