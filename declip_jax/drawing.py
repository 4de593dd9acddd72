"""A picture of what a run trains on: images as augmented, texts as the model reads them."""

import contextlib
import itertools
import textwrap
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from declip_jax.augment import augment
from declip_jax.data.image import decode
from declip_jax.data.order import Order
from declip_jax.data.sources import open_data
from declip_jax.data.sources.part import Part
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.step import Setup

# Pixels; a letter of text is about LETTER wide.
WIDTH, CELL, GAP, LABEL = 1600, 200, 24, 95
LINE, LETTER = 17, 8.5


class Sample(NamedTuple):
    """A sample of the training data, its views drawn several times."""

    key: str  # of the record
    original: np.ndarray  # uint8 [H, W, 3], as decoded
    images: np.ndarray  # float [draws, V, R, R, 3] in 0..1: all but normalized
    texts: list[list[tuple[str, str]]]  # for each draw pairs of title and text, see `read_texts`


def draw_samples(setup: Setup, records: int, draws: int) -> list[Sample]:
    """The first `records` samples of a run, each drawn `draws` times.

    Raises ValueError: the configuration or the data cannot be used.
    """
    config = setup.config
    names = setup.method.views
    source = open_data(config.data)

    # The order of train_batches. What is drawn for a sample depends on its number alone, so that of
    # a source with one record starts at this number too.
    order = Order(source, config.seed)
    chosen = [order[number] for number in range(records)]
    rows, batches = [Part(source, index, index + 1) for index in chosen], []
    for number, row in enumerate(rows):
        with contextlib.closing(setup.batches(row, number, batch_size=draws)) as stream:
            batches.append(next(stream))

    # The keys of make_init and make_train_step, for as many steps as there are draws.
    rng = jax.random.split(jax.random.PRNGKey(config.seed))[1]
    keys = [jax.random.split(jax.random.fold_in(rng, step))[0] for step in range(draws)]
    views = [config.views[name] for name in names.image]
    augment_draw = jax.jit(lambda key, images: augment(key, images, views, mean=0.0, std=1.0))
    images = np.stack([batch["image"] for batch in batches], axis=1)  # [draws, records, V, R, R, 3]
    drawn = np.stack([augment_draw(*one) for one in zip(keys, images, strict=True)], axis=1)
    samples = []
    for row, batch, pixels in zip(rows, batches, drawn, strict=True):
        texts = [read_texts(batch, draw, names.text) for draw in range(draws)]
        samples.append(Sample(row[0]["key"], decode(row[0]["image"]), pixels, texts))
    return samples


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
      out: the file.
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
        box = *place(left, top + CELL), CELL / WIDTH, CELL / height
        figure.add_axes(box, xticks=[], yticks=[]).imshow(pixels)

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

    operations = {
        "flip": view.flip,
        f"jitter {'/'.join(map(str, view.jitter))}": view.jitter_prob,
        "gray": view.grayscale_prob,
        f"blur σ {span(view.blur_sigma)}": view.blur_prob,
    }
    lines = [name, f"crop {span(view.crop_scale)}, ratio {span(view.crop_ratio)}"]
    return "\n".join(lines + [f"{what} p {p}" for what, p in operations.items() if p])


def text_title(names: tuple[str, ...], context: int, data) -> str:
    """The text views, of `context` tokens at most, and a line for each thing that is done to them
    by `config.data`."""
    lines = ["text, as the model reads it", f"at most {context} tokens"]
    if "masked" in names:
        lines.append(f"masked: each token p {data.mask_rate}")
    if "augmented" in names:
        lines.append(f"augmented: one of {', '.join(data.eda)}")
    return "\n".join(lines)
