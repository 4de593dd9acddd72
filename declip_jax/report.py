"""Draw a run on one page: its curves, and captions with the images they find.

  python -m declip_jax.report --workdir runs/quickstart

writes report.png into the workdir and says what the model learned.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from declip_jax.data.pipeline import eval_images
from declip_jax.data.sources import open_data, open_source
from declip_jax.data.tokenizer import tokenize
from declip_jax.evals.retrieval import top_matches
from declip_jax.evaluate import load
from declip_jax.metrics import read_metrics, table

# A panel: its title, whether it shows fractions, and for each curve its name in metrics.jsonl, its
# label and its line. Retrieval has a colour for each k and a dash for the other way.
PANELS = (
    ("Training loss", False, (("train/loss", "loss", "C0-"),)),
    (
        "Accuracy within the training batch, image to text",
        True,
        (("train/top1", "top-1", "C0-"), ("train/top5", "top-5", "C1-")),
    ),
    (
        "Zero-shot classification",
        True,
        (
            ("val/zeroshot/top1", "top-1", "C0-"),
            ("val/zeroshot/top5", "top-5", "C1-"),
            ("val/zeroshot/mean_per_class", "mean per class", "C2--"),
        ),
    ),
    (
        "Retrieval",
        True,
        (
            ("val/retrieval/text_to_image_r1", "text to image R@1", "C0-"),
            ("val/retrieval/text_to_image_r5", "text to image R@5", "C1-"),
            ("val/retrieval/text_to_image_r10", "text to image R@10", "C2-"),
            ("val/retrieval/image_to_text_r1", "image to text R@1", "C0--"),
            ("val/retrieval/image_to_text_r5", "image to text R@5", "C1--"),
            ("val/retrieval/image_to_text_r10", "image to text R@10", "C2--"),
        ),
    ),
)

# Pixels. Curves and captions both stand in two columns.
WIDTH, MARGIN, COLUMN, GAP = 1600, 40, 740, 40
HEADER, PANEL, HEADING, ENTRY = 80, 300, 70, 220
RIGHT, WRONG = "#1a7f37", "#cf222e"


def write_report(
    metrics_path: str | Path,
    gallery: Sequence[tuple[str, Sequence[tuple[np.ndarray, bool]]]],
    out_png: str | Path,
) -> None:
    """Writes a PNG, 1600 pixels wide and as high as it needs to be.

    Args:
      metrics_path: metrics.jsonl, one {"step": int, name: number, ...} a line. Lines may carry
        different names; curves no line has are left out. Where a resumed run logged a step again,
        the later line holds.
      gallery: captions, each with its best-matching images (uint8 [H, W, 3], whether the image is
        the caption's own), best first; five fill the row. May be empty.
      out_png: where to write.

    Raises:
      ValueError: a line that is not such an object, or neither curves nor captions to draw.
    """
    metrics_path = Path(metrics_path)
    curves = _read_curves(metrics_path)
    panels = [panel for panel in PANELS if any(name in curves for name, _, _ in panel[2])]
    if not panels and not gallery:
        raise ValueError(f"{metrics_path}: no curves to draw yet, and no captions either")

    curves_height = PANEL * -(-len(panels) // 2)
    gallery_height = (HEADING + ENTRY * -(-len(gallery) // 2)) if gallery else 0
    page = _Page(HEADER + curves_height + gallery_height + MARGIN // 2)
    page.text(MARGIN, 22, metrics_path.absolute().parent.name, size=17, weight="bold")
    page.text(MARGIN, 52, _summary(curves), size=10, color="0.4")

    for number, (title, fractions, lines) in enumerate(panels):
        left = MARGIN + (COLUMN + GAP) * (number % 2)
        top = HEADER + PANEL * (number // 2)
        page.text(left, top + 8, title, size=12, weight="bold")
        # Labels of the ticks stand left of the axes, those of the curves right of them.
        axes = page.axes(left + 50, top + 40, COLUMN - 280, PANEL - 90)
        _draw_curves(axes, curves, lines, fractions)
        axes.set_xlim(0, 1.02 * max(curves["step"]) or 1)  # the same in every panel

    top = HEADER + curves_height
    if gallery:
        hits = sum(matches[0][1] for _, matches in gallery)
        page.text(MARGIN, top + 8, "Captions and the images they find", size=12, weight="bold")
        page.text(
            MARGIN,
            top + 32,
            f"best match first; green: the caption's own image, red: another one; "
            f"{hits} of {len(gallery)} captions find their own first",
            size=10,
            color="0.4",
        )
    for number, (caption, matches) in enumerate(gallery):
        left = MARGIN + (COLUMN + GAP) * (number % 2)
        _draw_matches(page, left, top + HEADING + ENTRY * (number // 2), caption, matches)
    page.figure.savefig(out_png, format="png")


class _Page:
    """A figure addressed in pixels from its upper left corner."""

    def __init__(self, height: int):
        self.height = height
        # Not pyplot: it keeps every figure alive and picks a backend for the screen.
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor="white")

    def text(self, left: float, top: float, text: str, **style) -> None:
        # Captions are plain text: without parse_math a "$" in one would start a formula.
        self.figure.text(
            left / WIDTH, 1 - top / self.height, text, va="top", parse_math=False, **style
        )

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / WIDTH, bottom / self.height, width / WIDTH, height / self.height)
        )


def _read_curves(metrics_path: Path) -> dict[str, dict[int, float]]:
    """Returns for each name its value at each step, steps rising."""
    curves = defaultdict(dict)
    for row in read_metrics(metrics_path):
        for name, value in row.items():
            curves[name][row["step"]] = value
    return {name: dict(sorted(values.items())) for name, values in curves.items()}


def _summary(curves: dict[str, dict[int, float]]) -> str:
    parts = [f"step {max(curves['step']):,}"] if curves else ["no steps logged yet"]
    if "train/pairs_per_s" in curves:
        # The median: the first steps compile, and evaluations interrupt.
        rate = np.median(list(curves["train/pairs_per_s"].values()))
        parts.append(f"{rate:,.0f} pairs/s")
    for name, label, form in (
        ("train/learning_rate", "learning rate", ".3g"),
        ("train/logit_scale", "logit scale", ".1f"),
    ):
        if name in curves:
            parts.append(f"{label} {list(curves[name].values())[-1]:{form}}")
    return "   ·   ".join(parts)


def _draw_curves(axes: Axes, curves: dict, lines: tuple, fractions: bool) -> None:
    for name, label, line in lines:
        if name not in curves:
            continue
        steps = np.array(list(curves[name].keys()))
        values = np.array(list(curves[name].values()), float)
        marker = "." if len(values) <= 50 else None  # a lone value has no line
        window = len(values) // 50
        if window > 1:  # single batches scatter: show them pale, and their running mean
            axes.plot(steps, values, line, alpha=0.25, linewidth=0.8)
            steps = steps[window - 1 :]
            values = np.convolve(values, np.full(window, 1 / window), mode="valid")
        last = f"{values[-1]:.1%}" if fractions else f"{values[-1]:.3f}"
        axes.plot(steps, values, line, marker=marker, linewidth=1.8, label=f"{label}  {last}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.tick_params(labelsize=9, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("step", size=9)
    if fractions:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=9.5)


def _draw_matches(page: _Page, left: int, top: int, caption: str, matches: Sequence) -> None:
    caption = " ".join(caption.split())
    shown = caption if len(caption) <= 92 else caption[:91] + "…"
    page.text(left, top, f"“{shown}”", size=11)
    for rank, (image, is_right) in enumerate(matches):
        axes = page.axes(left + COLUMN / 5 * rank + 2, top + 28, 138, 138)
        height, width, _ = image.shape
        side = min(height, width)  # the centre square: what evaluation shows the model
        y, x = (height - side) // 2, (width - side) // 2
        axes.imshow(image[y : y + side, x : x + side])
        axes.set(xticks=[], yticks=[])
        colour = RIGHT if is_right else WRONG
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=4 if is_right else 2)
        # Not by colour alone.
        axes.set_xlabel(f"{rank + 1}  {'✓' if is_right else '✗'}", size=10, color=colour)


def make_gallery(config, encoder, images: int, captions: int) -> list:
    """Captions of the run's retrieval set, each with the five images it finds best.

    Args:
      config: of the run; without a `config.eval.retrieval.source`, its training data is used.
      encoder: encodes images and tokens.
      images: how many of the set to search, spread evenly over it.
      captions: how many to show, spread evenly over those images'.
    """
    settings = config.eval.retrieval
    if settings.source:
        source = open_source(settings.source, settings.split)
    else:
        source = open_data(config.data)
    pixels, captions_of = [], []
    for batch in eval_images(
        source,
        resolution=config.model.image.resolution,
        resize=config.eval.resize,
        batch_size=config.eval.batch_size,
        most=images,
    ):
        pixels.append(batch["image"])
        captions_of.extend(batch["captions"])
    pixels = np.concatenate(pixels)
    # Captions made of class names are those of many images: each is shown once, and is right for
    # all of them.
    texts = list(dict.fromkeys(own[-1] for own in captions_of))
    shown = min(captions, len(texts))
    texts = [texts[i * len(texts) // shown] for i in range(shown)]
    found = top_matches(
        encoder.encode_text(tokenize(texts, encoder.context)), encoder.encode_image(pixels), k=5
    )
    return [
        (text, [(pixels[j], text in captions_of[j]) for j in matches])
        for text, matches in zip(texts, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m declip_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--out", type=Path, help="default: report.png in the workdir")
    parser.add_argument("--images", type=int, default=256, help="how many to search (256)")
    parser.add_argument("--captions", type=int, default=12, help="how many to show (12)")
    args = parser.parse_args()
    out = args.out or args.workdir / "report.png"
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it will only read
    try:
        config, encoder, step = load(args.workdir)
        gallery = make_gallery(config, encoder, args.images, args.captions)
        write_report(args.workdir / "metrics.jsonl", gallery, out)
        evaluated = [
            {name: value for name, value in row.items() if name.startswith("val/")}
            for row in read_metrics(args.workdir / "metrics.jsonl")
        ]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    evaluated = [row for row in evaluated if row]
    if evaluated:
        print(f"What the model learned, at its last evaluation (step {step} is its newest):")
        print(table(evaluated[-1]))
    print(f"Curves and pictures: {out}")
    print(f"All curves:          tensorboard --logdir {args.workdir}  (pip install tensorboard)")


if __name__ == "__main__":
    main()
