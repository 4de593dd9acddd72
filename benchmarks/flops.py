"""FLOPs of a training step's matrix products and convolutions, counted from a configuration.

A product [n, k] x [k, m] is 2nkm. What a training step needs, whatever the implementation computes
twice: each product forward, and once more for the gradient of each of its two inputs that has one.
Images have none, nor have frozen weights, stopped features and the support set. Attention is
counted in full, causal or not. Compilers' own counts will not do: XLA's takes the body of a loop
once, and what rematerialization repeats twice.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Tower(NamedTuple):
    """Forward FLOPs of one image or text, and the sizes that heads start from."""

    first: float  # the layer that reads pixels; 0 for text
    rest: float
    tokens: int
    token_width: int
    pooled_width: int


def _blocks(layers: int, width: int, tokens: int) -> float:
    """Attention's four projections and an MLP of 4 * width; queries x keys, weights x values."""
    return layers * tokens * (2 * 12 * width**2 + 2 * 2 * tokens * width)


def vit(image, embed_dim: int) -> Tower:
    patches, width = (image.resolution // image.patch) ** 2, image.width
    return Tower(
        first=patches * 2 * (3 * image.patch**2) * width,
        rest=_blocks(image.layers, width, patches + 1) + 2 * width * embed_dim,
        tokens=patches,
        token_width=width,
        pooled_width=width,
    )


def resnet(image, embed_dim: int) -> Tower:
    def conv(side: int, kernel: int, inputs: int, outputs: int) -> float:
        return side**2 * 2 * kernel**2 * inputs * outputs

    side, stem = image.resolution // 2, image.width // 2
    first = conv(side, 3, 3, stem)
    rest = conv(side, 3, stem, stem) + conv(side, 3, stem, image.width)
    side, channels = side // 2, image.width
    for stage, depth in enumerate(image.layers):
        width = image.width * 2**stage
        for block in range(depth):
            out = side // 2 if stage > 0 and block == 0 else side  # pooled before the last layer
            rest += conv(side, 1, channels, width) + conv(side, 3, width, width)
            rest += conv(out, 1, width, 4 * width)
            if block == 0:
                rest += conv(out, 1, channels, 4 * width)  # of the shortcut
            side, channels = out, 4 * width
    keys = side**2 + 1  # the cells and their mean, which is the only query
    rest += 2 * channels**2 * (1 + 2 * keys) + 2 * 2 * keys * channels + 2 * channels * embed_dim
    return Tower(first, rest, tokens=side**2, token_width=channels, pooled_width=channels)


def text(text, embed_dim: int, tokens: int) -> Tower:
    width = text.width
    rest = _blocks(text.layers, width, tokens) + 2 * width * embed_dim
    return Tower(0.0, rest, tokens, token_width=width, pooled_width=width)


def train_step_flops(
    config, views: tuple[int, int], tokens: int | None = None, mlm_words: float = 1.8
) -> float:
    """FLOPs of a training step, over all devices.

    Args:
      config: the run's configuration.
      views: numbers of image and of text views that the method has for each pair.
      tokens: of each text; default: the context.
      mlm_words: masked words of a caption; default: 15 % of 12.

    Raises:
      ValueError: a loss term that is not known here.
    """
    model = config.model
    image = (vit if model.image.kind == "vit" else resnet)(model.image, model.embed_dim)
    caption = text(model.text, model.embed_dim, tokens or model.text.context)
    first = "image/patch_embed/" if model.image.kind == "vit" else "image/conv1/"
    frozen = any(re.search(pattern, f"{first}kernel") for pattern in config.optim.frozen)

    pair = views[0] * (image.first * (1 if frozen else 2) + image.rest * 3)
    pair += views[1] * caption.rest * 3
    for term, weight in config.loss.weights.items():
        for flops, passes in _term(term, config, image, caption, mlm_words):
            pair += flops * (passes if weight else 1)  # a term without weight is a metric
    return config.batch_size * pair


def _term(
    term: str, config, image: Tower, caption: Tower, mlm_words: float
) -> Iterator[tuple[float, int]]:
    """The products of a loss term, a pair: (forward FLOPs, passes with the backward ones)."""
    model, heads, batch = config.model, config.model.heads, config.batch_size
    two_views = "simsiam" in config.loss.weights  # DeCLIP's: of image and text, all contrasted
    logits = 2 * batch * model.embed_dim  # of one feature with all of the other modality
    if term in ("raw", "synthetic"):
        yield logits, 3
    elif term == "clip":
        yield logits * (4 if two_views else 1), 3
    elif term == "simclr":
        hidden, out = heads.simclr_hidden, heads.simclr
        yield 2 * 2 * (image.pooled_width * hidden + hidden**2 + hidden * out), 3
        yield 2 * 2 * (2 * batch) * out, 3  # two views of each image with all views
    elif term == "simsiam":
        hidden, out = heads.predictor, heads.projector
        yield 2 * 2 * (model.embed_dim * out + 2 * out**2 + 2 * out * hidden), 3
    elif term == "mlm":
        yield mlm_words * 2 * model.text.width * model.text.vocab_size, 3
    elif term == "nn_text":
        yield 2 * 2 * config.loss.support_set.size * model.embed_dim, 1  # both texts are looked up
        neighbors = config.loss.support_set.neighbors
        yield 4 * logits * neighbors, 2  # two images with two texts' neighbors, constants
    elif term == "filip":
        options = config.loss.late_interaction
        pairs, mapped = (4, 2) if two_views and options.all_views else (1, 1)
        yield mapped * 2 * image.tokens * image.token_width * heads.dense, 3
        yield mapped * 2 * caption.tokens * caption.token_width * heads.dense, 3
        # every token of one modality with the selected ones of all samples of the other
        keep = options.tokens or max(image.tokens, caption.tokens)
        products = image.tokens * min(keep, caption.tokens)
        products += caption.tokens * min(keep, image.tokens)
        yield pairs * 2 * batch * products * heads.dense, 3
    else:
        raise ValueError(f"benchmarks/flops.py does not know the loss term {term!r}.")
