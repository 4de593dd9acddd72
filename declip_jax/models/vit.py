"""The vision transformer of CLIP (Radford et al., https://arxiv.org/abs/2103.00020)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from declip_jax.models import transformer
from declip_jax.models.features import ImageFeatures
from declip_jax.models.init import Conv
from declip_jax.models.tower import ImageTower
from declip_jax.models.transformer import Compute
from declip_jax.section import at_least, between, one_of


class ViT(ImageTower):
    """`config.model.image` of kind "vit"."""

    first_layer = "patch_embed"
    family = "ViT"

    kind: str = one_of("vit")
    patch: int = at_least(1)  # pixels on a side
    width: int = at_least(1)
    layers: int = at_least(1)
    heads: int = at_least(1)
    # What stands for the image: a token of its own, the mean of the patches, or attention over them
    # by a learned query (`MapHead`). Only the first has a class token.
    pooling: str = one_of("class_token", "mean", "attention", value="class_token")
    positions: str = one_of("learned", "sincos2d", value="learned")
    # FLIP (Li et al., https://arxiv.org/abs/2212.00794): share of patches left out in training.
    patch_dropout: float = between(0, 1, 0.0, edges="[)")

    def demands(self, where):
        fits = self.resolution % self.patch == 0
        yield fits, "resolution", f"a multiple of {where}.patch={self.patch}"
        yield self.width % self.heads == 0, "width", f"a multiple of {where}.heads={self.heads}"
        fits = self.positions == "learned" or self.width % 4 == 0
        yield fits, "width", f"a multiple of 4 with {where}.positions='sincos2d'"

    @property
    def step(self) -> int:
        return self.patch

    @property
    def patches_kept(self) -> int:
        """So many of an image's patches go through the blocks in training."""
        return max(1, round(self.side**2 * (1 - self.patch_dropout)))

    def describe(self) -> str:
        return f"ViT/{self.patch}, {self.layers} layers"

    def build(self, embed_dim, activation, compute):
        return VisionTransformer(self, embed_dim, activation, compute)

    def resize(self, params, resolution):
        learned = self.positions == "learned"
        return self.resize_positions(params, resolution) if learned else params

    @classmethod
    def recognize(cls, shapes):
        patch, _, _, width = shapes.of("image/patch_embed/kernel", 4)
        class_token = "image/class_embedding" in shapes
        other = "attention" if "image/map_head/query_embedding" in shapes else "mean"
        positions = "image/positional_embedding"
        # Fixed positions tell no resolution: it is the usual one, as far as patches fill it.
        side = shapes.side(positions, class_token) if positions in shapes else 224 // patch
        return cls(
            kind="vit",
            resolution=patch * side,
            patch=patch,
            width=width,
            layers=shapes.of("image/blocks/ln_1/scale", 2)[0],
            heads=max(1, width // 64),
            pooling="class_token" if class_token else other,
            positions="learned" if positions in shapes else "sincos2d",
        )


def sincos2d(side: int, width: int) -> np.ndarray:
    """Fixed positions [side * side, width] of patches, row by row; width is a multiple of 4.

    A quarter each: sine and cosine of the column, sine and cosine of the row, times frequencies
    10,000^(-4i / width). MoCo v3 (Chen et al., https://arxiv.org/abs/2104.02057) and open_clip.
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [np.outer(place, frequencies) for place in (column, row)]  # [side * side, width / 4]
    parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class MapHead(nn.Module):
    """Tokens [B, N, width] -> [B, width]: attention over them by one learned query, then an MLP.

    The head of SigLIP (Zhai et al., https://arxiv.org/abs/2303.15343) in big_vision, from Set
    Transformer (Lee et al., https://arxiv.org/abs/1810.00825). It starts as the blocks do.
    """

    heads: int
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, _, width = x.shape
        normal = nn.initializers.normal(width**-0.5)
        query = self.param("query_embedding", normal, (width,))
        how = dict(dtype=self.dtype, kernel_init=normal, force_fp32_for_softmax=True)
        attention = nn.MultiHeadDotProductAttention(self.heads, **how, name="attn")
        x = attention(jnp.broadcast_to(query, (batch, 1, width)), x)[:, 0]  # [B, width]
        mlp = transformer.Mlp(self.activation, width**-0.5, self.dtype, name="mlp")
        return x + mlp(transformer.LayerNorm(name="ln")(x))


class VisionTransformer(nn.Module):
    """Images [B, resolution, resolution, 3] -> features.

    The pooled one is, after a last LayerNorm, the class token or the mean of the patches; or what
    `MapHead` makes of all patches after that LayerNorm. With `patch_dropout` in training, each
    image's patches are those that the rng "patch_dropout" keeps, and so are the tokens.

    Raises:
      ValueError: the images are not resolution x resolution; the positions are made for it.
      flax.errors.InvalidRngError: patch dropout in training without that rng.
    """

    config: ViT
    embed_dim: int
    activation: str
    compute: Compute

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, views: int = 1) -> ImageFeatures:
        del views  # no batch statistics
        config, compute, width = self.config, self.compute, self.config.width
        config.check_size(images)
        normal, batch = nn.initializers.normal(width**-0.5), len(images)
        size = (config.patch, config.patch)
        patches = Conv(width, size, size, "VALID", dtype=compute.dtype, name="patch_embed")
        x = patches(images).reshape(batch, -1, width)  # [B, h, w, width] -> [B, N, width]
        first = int(config.pooling == "class_token")  # where the patches begin
        if first:
            class_embedding = self.param("class_embedding", normal, (width,))
            class_token = jnp.broadcast_to(class_embedding, (batch, 1, width))
            x = jnp.concatenate([class_token, x], axis=1)  # [B, N + 1, width], float32
        if config.positions == "learned":
            x = x + self.param("positional_embedding", normal, x.shape[1:])
        else:
            # [N, width], zeros of the class token before them
            x = x + jnp.pad(sincos2d(config.side, width), ((first, 0), (0, 0)))
        if train and config.patch_dropout:
            # As many of each image, so that shapes do not depend on what is drawn. [B, N]
            drawn = jax.random.uniform(self.make_rng("patch_dropout"), (batch, config.side**2))
            kept = first + jnp.argsort(drawn, axis=1)[:, : config.patches_kept]
            kept = jnp.pad(kept, ((0, 0), (first, 0)))  # [B, 1 + K], the class token in front
            x = jnp.take_along_axis(x, kept[..., None], axis=1)
        x = transformer.LayerNorm(name="ln_pre")(x).astype(compute.dtype)
        sizes = config.layers, width, config.heads
        x, _ = transformer.blocks(
            *sizes, causal=False, activation=self.activation, compute=compute, name="blocks"
        )(x)
        ln_post = transformer.LayerNorm(name="ln_post")
        if config.pooling == "class_token":
            pooled = ln_post(x[:, 0])  # [B, width]
        elif config.pooling == "mean":
            pooled = ln_post(x.mean(axis=1, dtype=jnp.float32))
        else:
            head = MapHead(config.heads, self.activation, compute.dtype, name="map_head")
            pooled = head(ln_post(x))
        embedding = nn.Dense(
            self.embed_dim, use_bias=False, kernel_init=normal, dtype=compute.dtype, name="proj"
        )(pooled)
        return ImageFeatures(embedding, pooled, tokens=x[:, first:])
