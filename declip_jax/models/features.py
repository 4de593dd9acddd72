"""What the towers give: the embedding that all methods contrast, and what some heads start from.

What nobody reads is not computed: the compiler drops it.
"""

from typing import NamedTuple

import jax


class ImageFeatures(NamedTuple):
    """Leading axes are those of the images."""

    embedding: jax.Array  # [..., D] projected, not normalized
    pooled: jax.Array  # [..., width] what the projection reads
    tokens: jax.Array  # [..., P, width] patches kept, after the last block, or the last map's cells


class TextFeatures(NamedTuple):
    """Leading axes are those of the texts."""

    embedding: jax.Array  # [..., D] projected, not normalized
    words: jax.Array  # [..., L, width] every position after the last LayerNorm
