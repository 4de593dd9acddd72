"""Pre-LayerNorm residual attention blocks, shared by the image and the text transformer.

Parameters are float32, the residual stream and the matrix products are in `dtype`, LayerNorm and
the attention's softmax are computed in float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models.init import linear_bias

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}

# What the backward pass finds saved of a block: everything; the outputs of the four dense layers
# (not the [B, heads, T, T] attention weights); the block's input only.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Implementations of jax.nn.dot_product_attention.
ATTENTION = ("xla", "cudnn")

LayerNorm = functools.partial(
    nn.LayerNorm, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False
)


class Compute(NamedTuple):
    """How towers are computed; parameters do not depend on it, nor values but for rounding."""

    dtype: jnp.dtype  # of the matrix products and the residual stream
    scan: bool  # one compiled layer, or every layer unrolled
    remat: str  # a key of REMAT
    attention: str  # one of ATTENTION


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, width] -> [B, T, width]."""

    heads: int
    causal: bool
    out_std: float
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        normal, dense = nn.initializers.normal, functools.partial(nn.Dense, dtype=self.dtype)
        qkv = dense(3 * width, kernel_init=normal(width**-0.5), name="in_proj")(x)
        qkv = qkv.reshape(batch, length, 3, self.heads, width // self.heads)  # [B, T, 3, H, w/H]
        x = _attend(*(qkv[:, :, n] for n in range(3)), self.causal, self.implementation)
        x = x.reshape(batch, length, width)  # [B, T, H, w/H] -> [B, T, w]
        return dense(width, kernel_init=normal(self.out_std), name="out_proj")(x)


def _attend(query, key, value, causal: bool, implementation: str) -> jax.Array:
    """[B, T, H, w/H] three times -> [B, T, H, w/H]."""
    length, how = query.shape[1], dict(is_causal=causal, implementation=implementation)
    if implementation != "cudnn" or length % 2 == 0:
        return jax.nn.dot_product_attention(query, key, value, **how)
    # cuDNN's backward pass takes even lengths only.
    padded = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    lengths = jnp.full(len(query), length, jnp.int32)
    return jax.nn.dot_product_attention(*padded, key_value_seq_lengths=lengths, **how)[:, :length]


class Mlp(nn.Module):
    """Two dense layers with a hidden width of 4 * width, [B, T, width] -> [B, T, width]."""

    activation: str
    out_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, normal = x.shape[-1], nn.initializers.normal
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        widen = dict(kernel_init=normal((2 * width) ** -0.5), bias_init=linear_bias(width))
        narrow = dict(kernel_init=normal(self.out_std), bias_init=linear_bias(4 * width))
        x = ACTIVATIONS[self.activation](dense(4 * width, **widen, name="c_fc")(x))
        return dense(width, **narrow, name="c_proj")(x)


class Block(nn.Module):
    """One pre-LayerNorm block as the body of a scan: [B, T, width] -> ([B, T, width], None)."""

    heads: int
    causal: bool
    out_std: float
    activation: str
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        dtype, attention = self.compute.dtype, self.compute.attention
        attn = Attention(self.heads, self.causal, self.out_std, dtype, attention, name="attn")
        x = x + attn(LayerNorm(name="ln_1")(x))
        mlp = Mlp(self.activation, self.out_std, dtype, name="mlp")
        return x + mlp(LayerNorm(name="ln_2")(x)), None


def blocks(
    layers: int,
    width: int,
    heads: int,
    *,
    causal: bool,
    activation: str,
    compute: Compute,
    block: type[nn.Module] = Block,
    **fields: Any,
) -> nn.Module:
    """A stack of `layers` blocks; called with x [B, T, width] it returns (x, None).

    Every parameter is stacked over the layers on axis 0, whatever `compute.scan` says, so that a
    checkpoint does not depend on it: True compiles one block and loops over it (quick to compile),
    False unrolls the loop (the compiler may do better across blocks).

    Args:
      activation: a key of ACTIVATIONS.
      block: has `Block`'s fields and those in `fields`, its `name` among them. What it carries from
        layer to layer may be any pytree, such as (x, affinities): called with (carry, *same) it
        returns (carry, output), and the stack (carry, outputs), outputs stacked over the layers.
        The carry keeps its structure, shapes and types. `same` is given to every layer as it is: a
        mask, say.
    """
    if compute.remat != "none":
        # Inside a loop nothing is there for common-subexpression elimination to merge with.
        block = nn.remat(block, policy=REMAT[compute.remat], prevent_cse=not compute.scan)
    layerwise = dict(variable_axes={"params": 0}, split_rngs={"params": True})
    unroll = 1 if compute.scan else layers
    stack = nn.scan(block, **layerwise, in_axes=nn.broadcast, length=layers, unroll=unroll)
    # The residual branches' last layers shrink with depth, to keep the stream's variance.
    out_std = width**-0.5 * (2 * layers) ** -0.5
    return stack(heads, causal, out_std, activation, compute, **fields)
