"""The vision transformer of CLIP (Radford et al., https://arxiv.org/abs/2103.00020)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models import transformer
from declip_jax.models.features import ImageFeatures
from declip_jax.models.init import conv_kernel


class VisionTransformer(nn.Module):
    """Images [B, resolution, resolution, 3] -> features, the pooled one read at the class token.

    Raises:
      ValueError: the images are not resolution x resolution; the positions are learned for it.
    """

    resolution: int
    patch: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    activation: str
    dtype: jnp.dtype
    scan: bool
    remat: str
    attention: str

    @property
    def token_width(self) -> int:
        return self.width

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, views: int = 1) -> ImageFeatures:
        del train, views  # no dropout, no running statistics
        batch, height, width, _ = images.shape
        if (height, width) != (self.resolution, self.resolution):
            raise ValueError(
                f"images are {height}x{width} pixels, but model.image.resolution="
                f"{self.resolution}: resize the images or change the resolution"
            )
        normal = nn.initializers.normal(self.width**-0.5)
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            use_bias=False,
            kernel_init=conv_kernel,
            dtype=self.dtype,
            name="patch_embed",
        )(images)
        x = x.reshape(batch, -1, self.width)  # [B, h, w, width] -> [B, N, width]
        class_embedding = self.param("class_embedding", normal, (self.width,))
        class_token = jnp.broadcast_to(class_embedding, (batch, 1, self.width))
        x = jnp.concatenate([class_token, x], axis=1)  # [B, N + 1, width], float32
        x = x + self.param("positional_embedding", normal, x.shape[1:])
        x = transformer.LayerNorm(name="ln_pre")(x).astype(self.dtype)
        x, _ = transformer.blocks(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            causal=False,
            activation=self.activation,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
            attention=self.attention,
            name="blocks",
        )(x)
        pooled = transformer.LayerNorm(name="ln_post")(x[:, 0])  # [B, width]
        embedding = nn.Dense(
            self.embed_dim, use_bias=False, kernel_init=normal, dtype=self.dtype, name="proj"
        )(pooled)
        return ImageFeatures(embedding, pooled, tokens=x[:, 1:])
