"""Losses between two views of the same image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from declip_jax.losses import contrastive
from declip_jax.losses.contrastive import normalize


def nt_xent(
    z1: jax.Array, z2: jax.Array, temperature: float, info_nce: Callable = contrastive.info_nce
) -> jax.Array:
    """NT-Xent: each view must find the other among all views of all images but itself.

    Chen et al., A Simple Framework for Contrastive Learning of Visual Representations (SimCLR),
    2020, https://arxiv.org/abs/2002.05709; in SLIP: Mu et al., https://arxiv.org/abs/2112.12750.

    Args:
      z1, z2: [B, D], any length; row i of both is image i.

    Returns:
      The mean over the 2 * B views, a scalar.
    """
    z1, z2 = normalize(z1), normalize(z2)
    queries = jnp.concatenate([z1, z2])  # [2B, D]
    keys = jnp.concatenate([z2, z1])  # the positive of row i is row i; row i + B is itself
    losses, _ = info_nce(queries, keys, jnp.float32(1 / temperature), excluded=len(z1))
    return losses.mean()


def simsiam(p1: jax.Array, p2: jax.Array, z1: jax.Array, z2: jax.Array) -> jax.Array:
    """Negative cosine similarity of each view's prediction to the other's projection.

    Chen and He, Exploring Simple Siamese Representation Learning, 2021,
    https://arxiv.org/abs/2011.10566.

    Args:
      p1, p2: predictions [B, D] of the two views.
      z1, z2: projections [B, D]; no gradient goes into them.

    Returns:
      The mean over images and both directions, a scalar in -1 … 1.
    """

    def cosine(p, z):
        return (normalize(p) * jax.lax.stop_gradient(normalize(z))).sum(axis=-1)

    return -(cosine(p1, z2) + cosine(p2, z1)).mean() / 2
