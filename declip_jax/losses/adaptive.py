"""ALIP's gates: weights of samples and pairs from how well image and captions agree.

Yang et al., ALIP: Adaptive Language-Image Pre-training with Synthetic Caption, 2023,
https://arxiv.org/abs/2308.08428.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

RunningMeans = dict[str, jax.Array]


class Gates(NamedTuple):
    """Weights [B] without a gradient."""

    sample: jax.Array
    raw: jax.Array  # of the pair of image and raw caption
    synthetic: jax.Array  # of the pair of image and synthetic caption


def initial_means() -> RunningMeans:
    """Running means of the similarities "text", "raw" and "synthetic", before the first step."""
    return {name: jnp.ones(()) for name in ("text", "raw", "synthetic")}


def gates(
    image: jax.Array,
    raw: jax.Array,
    synthetic: jax.Array,
    means: RunningMeans,
    momentum: float,
    gamma: float,
) -> tuple[Gates, RunningMeans]:
    """Weights by how each similarity compares with its running mean H, updated before use.

    w_sample = min(1, exp(γ (s_text - H_text))), w_pair = exp(γ (s - H)), but 1 where the sample's
    weight, before it is capped, is 1 or more.

    Args:
      image, raw, synthetic: [B, D] unit rows of images and their two captions.
      means: the running means.
      momentum: of the running means, close to 1.
      gamma: γ.

    Returns:
      The weights, and the new running means.
    """
    image, raw, synthetic = jax.lax.stop_gradient((image, raw, synthetic))
    pairs = {"text": (raw, synthetic), "raw": (image, raw), "synthetic": (image, synthetic)}
    similarities = {name: (a * b).sum(axis=-1) for name, (a, b) in pairs.items()}  # [B] each
    means = {
        name: (1 - momentum) * similarity.mean() + momentum * means[name]
        for name, similarity in similarities.items()
    }
    weights = {
        name: jnp.exp(gamma * (similarity - means[name]))
        for name, similarity in similarities.items()
    }
    agree = weights["text"] >= 1
    return Gates(
        sample=jnp.minimum(weights["text"], 1.0),
        raw=jnp.where(agree, 1.0, weights["raw"]),
        synthetic=jnp.where(agree, 1.0, weights["synthetic"]),
    ), means
