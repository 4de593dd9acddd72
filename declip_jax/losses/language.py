"""Masked language modeling: Devlin et al., BERT, 2019, https://arxiv.org/abs/1810.04805."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Masked(NamedTuple):
    """The masked positions of a batch in a fixed number of places, in groups of examples."""

    words: jax.Array  # [G, K, width]
    labels: jax.Array  # int32 [G, K], -1 in a place that is empty
    dropped: jax.Array  # int32 scalar: masked positions that found no place


GROUP = 64  # examples that share their places: many, so that their number varies little


def take_masked(words: jax.Array, labels: jax.Array, share: float) -> Masked:
    """Gathers the features of masked positions, so that a head need not run on all of them.

    What is masked beyond the places of a group is left out. With a `share`, places for each
    position, somewhat above the rate of masking that hardly happens: a group is large.
    `words` are [B, L, width], `labels` int32 [B, L]: the id to predict or -1.
    """
    batch, length, width = words.shape
    group = math.gcd(batch, GROUP)
    positions = group * length
    places = min(math.ceil(share * positions), positions)
    words = words.reshape(-1, positions, width)  # [B, L, width] -> [G, group * L, width]
    labels = labels.reshape(-1, positions)  # [B, L] -> [G, group * L]
    chosen = jnp.argsort(labels < 0, axis=1, stable=True)[:, :places]  # [G, K], masked ones first
    kept = jnp.take_along_axis(labels, chosen, axis=1)
    dropped = (labels >= 0).sum() - (kept >= 0).sum()
    return Masked(jnp.take_along_axis(words, chosen[..., None], axis=1), kept, dropped)


class MaskedLoss(NamedTuple):
    """Sums over a batch, or over a part of one, float32 [1]: parts add up."""

    loss: jax.Array  # cross-entropies
    words: jax.Array  # positions they are of
    dropped: jax.Array  # masked positions that found no place

    def mean(self) -> jax.Array:
        """The mean over masked positions; 0 when there is none."""
        return self.loss.sum() / jnp.maximum(self.words.sum(), 1.0)


def masked_lm(
    head: Callable[[jax.Array], jax.Array], words: jax.Array, labels: jax.Array, share: float
) -> MaskedLoss:
    """Cross-entropy of the ids at masked positions, for the rest as `take_masked`.

    `head` makes features [..., width] to logits [..., vocabulary].
    """
    masked = take_masked(words, labels, share)
    logits = head(masked.words).astype(jnp.float32)  # [G, K, vocabulary]
    there = masked.labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(masked.labels, 0))
    sums = jnp.where(there, losses, 0.0).sum(), there.sum(), masked.dropped
    return MaskedLoss(*(x.astype(jnp.float32)[None] for x in sums))
