"""Contrastive losses between two sets of paired features."""

import jax
import jax.numpy as jnp
import optax


def normalise(features: jax.Array) -> jax.Array:
    """Scales each row of `features` [..., D] to unit length."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def similarity(queries: jax.Array, keys: jax.Array, scale: jax.Array) -> jax.Array:
    """Scaled cosine similarities of unit rows: [B, D], [K, D] -> [B, K].

    The product is small beside the towers', and its rounding is multiplied by `scale` (up to 100):
    it is computed in full float32 on every backend.
    """
    return scale * jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)


def info_nce(logits: jax.Array) -> jax.Array:
    """InfoNCE, one value a query: the positive of row i is column i.

    van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.

    Args:
      logits: [B, K] similarities, already scaled; K >= B.

    Returns:
      [B] cross-entropies.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(logits)))


def clip_loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """Symmetric InfoNCE over all pairs of the global batch.

    Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.

    Args:
      image: [B, D] unit rows.
      text: [B, D] unit rows; row i belongs to image i.
      scale: exp(logit_scale), a scalar.

    Returns:
      The mean over both directions, a scalar.
    """
    logits = similarity(image, text, scale)  # [B, B]
    return (info_nce(logits).mean() + info_nce(logits.T).mean()) / 2


def retrieval_accuracy(queries: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """Share of [B, D] unit rows whose own key is the nearest, or among the nearest five.

    Of equally near keys those with the lower index count as nearer: features that are all the
    same, or not numbers, do not look accurate.
    """
    logits = similarity(queries, keys, jnp.ones(()))  # [B, B]
    own = jnp.diagonal(logits)[:, None]
    place = jnp.arange(len(logits))
    behind = (logits < own) | ((logits == own) & (place[None, :] >= place[:, None]))
    rank = (~behind).sum(axis=1)  # [B]
    return {"top1": (rank < 1).mean(), "top5": (rank < 5).mean()}
