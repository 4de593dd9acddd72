"""The ResNet of CLIP (Radford et al., https://arxiv.org/abs/2103.00020): a three-convolution stem,
average pooling before every stride (anti-aliasing), attention in place of the last pooling."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models.batchnorm import BatchNorm
from declip_jax.models.features import ImageFeatures
from declip_jax.models.init import Conv, linear_bias
from declip_jax.models.tower import ImageTower
from declip_jax.models.transformer import Compute
from declip_jax.section import at_least, one_of


def _pool(x: jax.Array, stride: int) -> jax.Array:
    """Average over stride x stride windows, [B, h, w, C] -> [B, h/stride, w/stride, C]."""
    return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x


class Bottleneck(nn.Module):
    """[B, h, w, C] -> [B, h/stride, w/stride, 4 * width]."""

    width: int
    stride: int
    bn_group_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, views: int) -> jax.Array:
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(BatchNorm, self.bn_group_size, self.dtype)
        y = conv(self.width, (1, 1), name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, train, views))
        y = conv(self.width, (3, 3), padding=1, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y, train, views))
        y = conv(4 * self.width, (1, 1), name="conv3")(_pool(y, self.stride))
        # A zero gamma makes the block the identity at the start.
        y = norm(scale_init=nn.initializers.zeros, name="bn3")(y, train, views)
        if self.stride > 1 or x.shape[-1] != 4 * self.width:
            x = conv(4 * self.width, (1, 1), name="downsample_conv")(_pool(x, self.stride))
            x = norm(name="downsample_bn")(x, train, views)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """Cells [B, P, C] -> [B, embed_dim], [B, C]: attention over them, queried by their mean.

    The second is what the last projection reads.
    """

    heads: int
    embed_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, cells, channels = x.shape
        normal = nn.initializers.normal(channels**-0.5)
        dense = functools.partial(
            nn.Dense, kernel_init=normal, bias_init=linear_bias(channels), dtype=self.dtype
        )
        mean = x.mean(axis=1, dtype=jnp.float32, keepdims=True)
        x = jnp.concatenate([mean, x], axis=1)  # [B, P + 1, C]
        x = x + self.param("positional_embedding", normal, (cells + 1, channels))
        per_head = (batch, -1, self.heads, channels // self.heads)  # [B, T, C] -> [B, T, H, C/H]
        query, key, value = (
            dense(channels, name=f"{name}_proj")(inputs).reshape(per_head)
            for name, inputs in (("q", x[:, :1]), ("k", x), ("v", x))
        )
        pooled = jax.nn.dot_product_attention(query, key, value)  # [B, 1, H, C/H]
        pooled = pooled.reshape(batch, channels)  # [B, 1, H, C/H] -> [B, C]
        return dense(self.embed_dim, name="c_proj")(pooled), pooled


class ResNet(ImageTower):
    """`config.model.image` of kind "resnet"."""

    first_layer = "conv1"
    family = "RN"
    step = 32

    kind: str = one_of("resnet")
    width: int = at_least(1)  # channels of the first stage, whose blocks end in 4 times as many
    layers: tuple[int, int, int, int] = at_least(1)  # of the four stages
    heads: int = at_least(1)  # of the attention pool, over 32 * width channels
    bn_group_size: int = at_least(0, 0)  # examples that share batch statistics; 0: all

    def demands(self, where):
        yield self.resolution % 32 == 0, "resolution", "a multiple of 32"
        yield self.width % 2 == 0, "width", "an even number"
        fits = self.token_width % self.heads == 0
        yield fits, "heads", f"a divisor of 32 * {where}.width={self.token_width}"

    @property
    def token_width(self) -> int:
        return 32 * self.width

    def describe(self) -> str:
        return f"ResNet {'-'.join(map(str, self.layers))}"

    def build(self, embed_dim, activation, compute):
        del activation  # ReLU
        return ModifiedResNet(self, embed_dim, compute)

    @classmethod
    def recognize(cls, shapes):
        width = shapes.of("image/conv3/kernel", 4)[3]
        blocks = {path.split("/")[1] for path in shapes if path.startswith("image/layer")}
        depths = (sum(name.startswith(f"layer{n}_") for name in blocks) for n in range(1, 5))
        return cls(
            kind="resnet",
            resolution=32 * shapes.side("image/attnpool/positional_embedding"),
            width=width,
            layers=tuple(depths),
            heads=max(1, 32 * width // 64),
        )

    def resize(self, params, resolution):
        return {**params, "attnpool": self.resize_positions(params["attnpool"], resolution)}


class ModifiedResNet(nn.Module):
    """Images [B * views, resolution, resolution, 3], views of an example in turn -> features.

    The last map has 1/32 of the resolution and 32 * width channels. In training, batch
    normalization takes the statistics of each view by itself.

    Raises ValueError: the images are not resolution x resolution; the positions are learned for it.
    """

    config: ResNet
    embed_dim: int
    compute: Compute

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, views: int = 1) -> ImageFeatures:
        config, dtype = self.config, self.compute.dtype
        config.check_size(images)
        width, group_size, x = config.width, config.bn_group_size, images
        stem = ((width // 2, 2), (width // 2, 1), (width, 1))  # channels and stride
        for n, (channels, stride) in enumerate(stem, start=1):
            conv = Conv(channels, (3, 3), stride, padding=1, dtype=dtype, name=f"conv{n}")
            norm = BatchNorm(group_size, dtype, name=f"bn{n}")
            x = nn.relu(norm(conv(x), train, views))
        x = _pool(x, 2)
        for stage, depth in enumerate(config.layers):
            for block in range(depth):
                stride, name = 2 if stage > 0 and block == 0 else 1, f"layer{stage + 1}_{block}"
                bottleneck = Bottleneck(width * 2**stage, stride, group_size, dtype, name=name)
                x = bottleneck(x, train, views)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, h, w, C] -> [B, h*w, C]
        attnpool = AttentionPool(config.heads, self.embed_dim, dtype, name="attnpool")
        return ImageFeatures(*attnpool(x), tokens=x)
