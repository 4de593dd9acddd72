"""Contrastive losses between two sets of paired features."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def normalize(features: jax.Array) -> jax.Array:
    """Scales each row of `features` [..., D] to unit length."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def similarity(queries: jax.Array, keys: jax.Array, scale: jax.Array) -> jax.Array:
    """Scaled cosine similarities of unit rows: [B, D], [K, D] -> [B, K].

    The product is small beside the towers', and its rounding is multiplied by `scale` (up to 100):
    it is computed in full float32 on every backend.
    """
    return scale * jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)


def info_nce(
    x: jax.Array, y: jax.Array, scale: jax.Array, excluded: int = 0
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE in both directions, one value a row: the positive of x[i] is y[i], and the reverse.

    van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018,
    https://arxiv.org/abs/1807.03748. `losses.ring` has the same without the [N, N] logits.

    Args:
      x: [N, D] unit rows.
      y: [N, D] unit rows.
      scale: a scalar, the inverse temperature.
      excluded: k > 0 leaves the pairs of x[i] and y[(i + k) mod N] out.

    Returns:
      Cross-entropies [N] of x against all of y, and [N] of y against all of x.
    """
    logits = similarity(x, y, scale)  # [N, N]
    positive = jnp.diagonal(logits)
    if excluded:
        row = jnp.arange(len(x))
        logits = logits.at[row, (row + excluded) % len(x)].set(-jnp.inf)
    return tuple(jax.nn.logsumexp(logits, axis=axis) - positive for axis in (1, 0))


def positive_rank(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """How many keys are nearer to a query than its own: [N, D], [N, D] unit rows -> int32 [N]."""
    return positive_rank_of(similarity(queries, keys, jnp.ones(())))


def positive_rank_of(logits: jax.Array) -> jax.Array:
    """How many columns exceed the diagonal in each row: [N, N] -> int32 [N].

    Of equal ones those with the lower index count as larger, and so does what is not a number:
    features that are all the same, or broken, do not look accurate.
    """
    own = jnp.diagonal(logits)[:, None]
    place = jnp.arange(len(logits))
    behind = (logits < own) | ((logits == own) & (place[None, :] >= place[:, None]))
    return (~behind).sum(axis=1)


def clip_loss(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    weights: jax.Array | float = 1.0,
    info_nce: Callable = info_nce,
) -> jax.Array:
    """Symmetric InfoNCE over all pairs of the global batch.

    Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
    https://arxiv.org/abs/2103.00020.

    Args:
      image: [B, D] unit rows.
      text: [B, D] unit rows; row i belongs to image i.
      scale: exp(logit_scale), a scalar.
      weights: of each pair, [B].
      info_nce: this module's, or one that needs less memory.

    Returns:
      The mean over pairs and both directions, a scalar.
    """
    image_to_text, text_to_image = info_nce(image, text, scale)
    return (weights * (image_to_text + text_to_image) / 2).mean()


def nearest_neighbor_loss(
    image: jax.Array, neighbors: jax.Array, scale: jax.Array, info_nce: Callable = info_nce
) -> jax.Array:
    """InfoNCE of images against the support-set neighbors of their captions.

    Li et al., Supervision Exists Everywhere (DeCLIP), 2022, https://arxiv.org/abs/2110.05208.

    Args:
      image: [B, D] unit rows.
      neighbors: [B, k, D] unit rows.

    Returns:
      The mean over images and neighbors, a scalar.
    """
    losses = [info_nce(image, neighbors[:, n], scale)[0] for n in range(neighbors.shape[1])]
    return sum(losses).mean() / len(losses)
