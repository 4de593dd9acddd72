"""Layers that methods put on top of the towers. Linear layers start as torch's do."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models.batchnorm import BatchNorm
from declip_jax.models.init import conv_kernel, linear_bias
from declip_jax.section import Section, at_least


class Heads(Section):
    """`config.model.heads`: widths of the methods' own layers."""

    projector: int = at_least(1)  # DeCLIP: SimSiam's projector, hidden and out
    predictor: int = at_least(1)  # DeCLIP: SimSiam's predictor, hidden
    simclr_hidden: int = at_least(1)  # SLIP
    simclr: int = at_least(1)  # SLIP: out
    dense: int = at_least(1)  # FILIP: of each token


def linear(fan_in: int, features: int, dtype: jnp.dtype, name: str | None = None) -> nn.Dense:
    """torch's nn.Linear(fan_in, features) as it starts."""
    return nn.Dense(
        features, kernel_init=conv_kernel, bias_init=linear_bias(fan_in), dtype=dtype, name=name
    )


class Mlp(nn.Module):
    """Linear layers, batch normalization and ReLU between: [B, V, C] -> [B, V, widths[-1]].

    SimSiam's projector and predictor (Chen and He, https://arxiv.org/abs/2011.10566) and SimCLR's
    head (Chen et al., https://arxiv.org/abs/2002.05709). The statistics are those of each view.

    Attributes:
      widths: outputs of the layers.
      last_norm: the last layer has batch normalization too (and no ReLU).
      dtype: of the products; the result is float32.
    """

    widths: tuple[int, ...]
    last_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        batch, views, _ = x.shape
        x = x.reshape(batch * views, -1)  # [B, V, C] -> [B * V, C]
        for n, width in enumerate(self.widths, start=1):
            x = linear(x.shape[-1], width, self.dtype, f"linear{n}")(x)
            last = n == len(self.widths)
            if not last or self.last_norm:
                x = BatchNorm(dtype=self.dtype, name=f"bn{n}")(x, train, views)
            if not last:
                x = nn.relu(x)
        return x.reshape(batch, views, -1).astype(jnp.float32)  # [B * V, C] -> [B, V, C]
