"""Layers and initializers that start as torch's modules do by default, as the published code's."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), nn.Conv2d's weights.
conv_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=conv_kernel)


def linear_bias(fan_in: int) -> Callable[..., jax.Array]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), nn.Linear's bias; its shape does not tell fan_in."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
