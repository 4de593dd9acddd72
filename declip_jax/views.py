"""Draw what a run trains on: image views as augmented, text views as the model reads them.

  python -m declip_jax.views --config configs/declip_vit_b32_yfcc15m.py --out views.png

shows the first samples of the run's training data. "draw 1" is what the first step of a run in one
process sees: the same crops, captions and random operations, to rounding. Further draws show what
else these samples may become; the run itself draws otherwise when it comes to them again. Fields of
the configuration can be set: --config.views.strong.blur_prob=1.
"""

import contextlib
import functools
import itertools
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from declip_jax.augment import augment, check_view
from declip_jax.data.image import decode
from declip_jax.data.order import Order
from declip_jax.data.sources import Source, open_data
from declip_jax.data.tokenizer import EOT, MASK, WORD_END, build
from declip_jax.main import parse_flags  # and the flag --config
from declip_jax.methods import Views
from declip_jax.step import Setup

flags.declare_key_flag("config")
_OUT = flags.DEFINE_string("out", "views.png", "Picture to write, a PNG.")
_RECORDS = flags.DEFINE_integer("records", 6, "How many samples to show.", lower_bound=1)
_DRAWS = flags.DEFINE_integer("draws", 2, "How often to draw each one's views.", lower_bound=1)

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


def draw_samples(config, records: int, draws: int) -> tuple[Views, list[Sample]]:
    """The method's views, and the first `records` samples of a run, each drawn `draws` times.

    Raises:
      ValueError: the configuration or the data cannot be used.
    """
    config = ConfigDict(config).unlock()
    config.data.workers = 0
    setup = Setup(config)
    config.batch_size = draws  # of what is drawn, not of what the method is built for
    names = setup.method.views
    for name in names.image:
        check_view(name, config.views[name])
    source = open_data(config.data)

    # The order of train_batches. What is drawn for a sample depends on its number alone, so that of
    # a source with one record starts at this number too.
    order = Order(source, config.seed)
    rows = [OneRecord(source, order[number]) for number in range(records)]
    batches = []
    for number, row in enumerate(rows):
        with contextlib.closing(setup.batches(row, start_sample=number)) as stream:
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
    return names, [
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
        texts.append((name, detokenize(tokens[1 : (tokens == EOT).argmax()])))
        if name == "masked":
            labels = batch["mlm_labels"][row]
            words = [detokenize([label]) for label in labels if label >= 0]
            texts.append(("to predict", ", ".join(words) or "(no token was chosen)"))
    return texts


def detokenize(tokens) -> str:
    """Text of ids between SOT and EOT, "[mask]" for MASK; words and marks stand apart."""
    tokenizer = _tokenizer()
    spellings = [
        f"[mask]{WORD_END}" if i == MASK else tokenizer.id_to_token(int(i)) for i in tokens
    ]
    # All together, not one by one: a letter can take several.
    return tokenizer.decoder.decode(spellings).strip()


@functools.cache
def _tokenizer() -> Tokenizer:
    return build()


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


def text_title(config, names: tuple[str, ...]) -> str:
    lines = ["text, as the model reads it", f"at most {config.model.text.context} tokens"]
    if "masked" in names:
        lines.append(f"masked: each token p {config.data.mask_rate}")
    if "augmented" in names:
        lines.append(f"augmented: one of {', '.join(config.data.eda)}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: fields are set as --config.a.b=c")
    config = flags.FLAGS.config
    logging.set_verbosity(logging.WARNING)
    try:
        names, samples = draw_samples(config, _RECORDS.value, _DRAWS.value)
        titles = [image_title(name, config.views[name]) for name in names.image]
        draw_page(samples, [*titles, text_title(config, names.text)], _OUT.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{config.method}, first samples of {config.data.source!r}: {_OUT.value}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
