"""FILIP's token-wise late interaction, and the loss over it.

Yao et al., FILIP: Fine-grained Interactive Language-Image Pre-Training, 2021, arXiv:2111.07783.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec


def late_interaction(
    image: jax.Array,
    text: jax.Array,
    *,
    tokens: int,
    text_mask: jax.Array | None = None,
    mesh: Mesh,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Mean over a sample's tokens of the maximum over another sample's selected tokens.

    Of each sample only the `tokens` tokens with the largest summed similarity to the other modality
    of their own pair are selected, for other samples to take the maximum over: DeCLIP's code. The
    choice has no gradient. The mean runs over all tokens. `tokens=0` selects all: FILIP's paper.

    Without `text_mask` padding takes part like any token, as in DeCLIP's code; the result then
    depends on the length L to which captions were padded. With it padding is in no selection, no
    maximum and no mean, and has no say in which image tokens are selected.

    The products are made in the features' dtype and summed in float32; those of float32 features
    in full float32 on every backend. They can cost a fifth of a training step: bfloat16 is what to
    pass on an accelerator.

    Samples are sharded over all devices of `mesh`. Each device gathers the selected tokens of all
    samples and goes through them in steps, whose similarities the backward pass makes again.

    Args:
      image: [B, P, E] unit tokens; B is a multiple of the number of devices.
      text: [B, L, E] unit tokens of the same dtype; sample i belongs to image i.
      tokens: selected tokens of a sample, at most; 0: all.
      text_mask: [B, L] bool, False at padding; at least one True in each row.
      mesh: the devices.
      block: a step makes [B / devices * P, block] similarities at most (L for P in the other
        direction): as many samples as divide B and as `block` has room for with all their
        selected tokens, and never less than one.

    Returns:
      image_to_text [B, B] and text_to_image [B, B], float32 in -1..1, not scaled. Row i: sample i's
      tokens are averaged over; column j: the maximum is taken over sample j's.

    Raises ValueError: shapes or dtypes that do not go together.
    """
    if image.shape[::2] != text.shape[::2] or image.dtype != text.dtype:
        raise ValueError(
            f"image tokens {image.dtype}{image.shape} and text tokens {text.dtype}{text.shape}: "
            "expected [B, P, E] and [B, L, E] of the same B, E and dtype"
        )
    if text_mask is not None and text_mask.shape != text.shape[:2]:
        raise ValueError(f"text_mask {text_mask.shape}: expected [B, L] = {text.shape[:2]}")
    dtype = image.dtype

    def local(image, text, text_mask):  # [B / devices, ...]
        # float32 outside the products: there gradients are summed over steps and devices.
        image, text = image.astype(jnp.float32), text.astype(jnp.float32)
        selected_image = _select(image, text, tokens, None, text_mask)
        selected_text = _select(text, image, tokens, text_mask, None)
        gather = functools.partial(jax.lax.all_gather, axis_name=mesh.axis_names, tiled=True)
        return (
            _mean_of_maxima(image, gather(selected_text), None, dtype, block),
            _mean_of_maxima(text, gather(selected_image), text_mask, dtype, block),
        )

    rows = PartitionSpec(mesh.axis_names)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows)
    return sharded(image, text, text_mask)


def _select(features, others, tokens, mask, others_mask):
    """The `tokens` of [B, T, E] most similar, in sum, to their pair's [B, U, E]: [B, tokens, E]."""
    # The sum of the similarities is the similarity to the sum.
    where = None if others_mask is None else others_mask[:, :, None]
    total = others.sum(axis=1, where=where)  # [B, E]
    score = jnp.einsum("bte,be->bt", features, total, precision=jax.lax.Precision.HIGHEST)
    if mask is not None:
        score = jnp.where(mask, score, -jnp.inf)
    length = features.shape[1]
    _, place = jax.lax.top_k(jax.lax.stop_gradient(score), min(tokens or length, length))
    if mask is not None:
        # Where real tokens are too few the best one stands in again: no maximum changes.
        place = jnp.where(jnp.take_along_axis(mask, place, axis=1), place, place[:, :1])
    return jnp.take_along_axis(features, place[:, :, None], axis=1)


def _mean_of_maxima(queries, keys, mask, dtype, block):
    """[b, P, E], [B, T, E] -> [b, B]: the mean, where `mask` [b, P], of the maxima over T."""
    b, length, width = queries.shape
    count, per_key, _ = keys.shape
    samples = next(n for n in range(max(1, block // per_key), 0, -1) if count % n == 0)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    @functools.partial(jax.checkpoint, prevent_cse=False)  # nothing to prevent inside a loop
    def columns(step):  # [samples, T, E] -> [b, samples]
        similarities = jnp.matmul(  # a plain 2-D product: others are copied for their transpose
            queries.reshape(b * length, width).astype(dtype),  # [b, P, E] -> [b * P, E]
            step.reshape(samples * per_key, width).astype(dtype).T,  # -> [samples * T, E]
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        maxima = similarities.reshape(b, length, samples, per_key).max(axis=3)
        return maxima.mean(axis=1, where=None if mask is None else mask[:, :, None])

    steps = keys.reshape(count // samples, samples, per_key, width)
    similarities = jax.lax.map(columns, steps)  # [B / samples, b, samples]
    return similarities.swapaxes(0, 1).reshape(b, count)


def filip_loss(image_to_text: jax.Array, text_to_image: jax.Array, scale: jax.Array) -> jax.Array:
    """Symmetric InfoNCE over the similarities of `late_interaction`.

    Args:
      image_to_text: [B, B], a row an image; the positive of row i is column i.
      text_to_image: [B, B], a row a text.
      scale: exp(logit_scale), a scalar.

    Returns:
      The mean over both directions, a scalar.
    """
    own = jnp.arange(len(image_to_text))
    image_loss, text_loss = (
        optax.softmax_cross_entropy_with_integer_labels(scale * similarities, own).mean()
        for similarities in (image_to_text, text_to_image)
    )
    return (image_loss + text_loss) / 2
