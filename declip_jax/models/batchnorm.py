"""Batch normalization over the global batch or over groups of it (Ioffe and Szegedy,
https://arxiv.org/abs/1502.03167), with torch's running statistics."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

MOMENTUM = 0.1
EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Normalize x [B * views, ..., C] over all axes but the last, computed in float32.

    Each of the `views` of an example (neighbors on axis 0) has statistics of its own, as if the
    views went through one after the other; the running statistics are updated in their order.

    In training the statistics are those of the batch: under jit of the whole global batch, or,
    with `group_size` > 0, of each group of that many consecutive examples, which is what
    unsynchronized training with that many examples a GPU computes. The running statistics (in
    "batch_stats": mean, var) keep 1 - MOMENTUM of the old value and take the rest from the batch
    mean and the *unbiased* batch variance. Over groups they take the average of the groups'
    statistics, where published checkpoints hold those of the first GPU alone.

    Raises:
      ValueError: in training, B is not a multiple of group_size, or a channel has a single value
        in a group and view.
    """

    group_size: int = 0
    dtype: jnp.dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, views: int = 1) -> jax.Array:
        shape, channels = x.shape, x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        x = x.astype(jnp.float32)
        if train:
            batch = shape[0] // views
            group = self.group_size or batch
            if batch % group:
                raise ValueError(
                    f"bn_group_size={group} does not divide the batch of {batch} examples: "
                    "choose a divisor, or 0 for statistics over the whole batch"
                )
            # [B * V, ..., C] -> [G, group, V, ..., C]
            x = x.reshape(-1, group, views, *shape[1:])
            axes = (1, *range(3, x.ndim - 1))
            count = math.prod(x.shape[axis] for axis in axes)
            if count < 2:
                raise ValueError(
                    "batch statistics need more than one value a channel, got 1: the batch (of "
                    "each group, microbatch) must have at least two examples"
                )
            mean = x.mean(axes, keepdims=True)  # [G, 1, V, 1, ..., C]
            var = jnp.square(x - mean).mean(axes, keepdims=True)
            if not self.is_initializing():
                unbiased = var * (count / (count - 1))
                for running, batch in ((running_mean, mean), (running_var, unbiased)):
                    # [G, 1, V, 1, ..., C] -> [V, C]
                    for of_view in batch.reshape(-1, views, channels).mean(axis=0):
                        running.value = (1 - MOMENTUM) * running.value + MOMENTUM * of_view
        else:
            mean, var = running_mean.value, running_var.value
        x = (x - mean) * (jax.lax.rsqrt(var + EPSILON) * scale) + bias
        return x.reshape(shape).astype(self.dtype)
