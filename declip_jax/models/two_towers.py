"""An image tower and a text tower into one embedding space, and how a config describes them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models.features import ImageFeatures, TextFeatures
from declip_jax.models.heads import Heads
from declip_jax.models.resnet import ResNet
from declip_jax.models.text import Text
from declip_jax.models.tower import ImageTower
from declip_jax.models.transformer import ACTIVATIONS, ATTENTION, REMAT, Compute
from declip_jax.models.vit import ViT
from declip_jax.section import Section, at_least, one_of, option

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
IMAGE_TOWERS: dict[str, type[ImageTower]] = {"vit": ViT, "resnet": ResNet}


def read_image(values: Any, where: str) -> ImageTower:
    """The image tower that a section describes, by its kind; see `Section.read`."""
    if isinstance(values, ImageTower):
        return values
    kind = values["kind"] if "kind" in values else None
    if kind not in IMAGE_TOWERS:
        raise ValueError(f"{where}.kind={kind!r} is not one of {list(IMAGE_TOWERS)}.")
    return IMAGE_TOWERS[kind].read(values, where)


class Model(Section):
    """`config.model`."""

    embed_dim: int = at_least(1)  # of the common space
    image: ImageTower = option(read=read_image)
    text: Text
    activation: str = one_of(*ACTIVATIONS)
    attention: str = one_of(*ATTENTION)
    # None: a model without a method.
    heads: Heads | None = option(read=lambda x, where: None if x is None else Heads.read(x, where))
    dtype: str = one_of(*DTYPES)
    scan: bool
    remat: str = one_of(*REMAT)
    # Configurations from before these two fields have neither.
    init_logit_scale: float = -math.log(0.07)  # a logarithm
    init_logit_bias: float | None = None  # None: logits have no bias

    def check(self, where: str) -> None:
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(
                f"{where}.attention='cudnn' must be 'xla' unless {where}.dtype='bfloat16'."
            )

    @property
    def compute(self) -> Compute:
        return Compute(DTYPES[self.dtype], self.scan, self.remat, self.attention)


class TwoTowers(nn.Module):
    """Variables: "params" (float32: image/..., text/..., logit_scale, and logit_bias where it has a
    start) and, of the ResNet, "batch_stats". Embeddings are float32, whatever the towers compute
    in, and not normalized."""

    image: nn.Module
    text: nn.Module
    init_logit_scale: float
    init_logit_bias: float | None

    def setup(self) -> None:
        constant = nn.initializers.constant
        self.logit_scale = self.param("logit_scale", constant(self.init_logit_scale), ())
        if self.init_logit_bias is not None:
            self.logit_bias = self.param("logit_bias", constant(self.init_logit_bias), ())

    def encode_image(self, images: jax.Array, train: bool = False) -> ImageFeatures:
        """Images float [B, V, H, W, 3], normalized as in training -> features [B, V, ...].

        All views go through in one pass. With train=True batch normalization uses the batch's
        statistics, of each view by itself, and updates the running ones: apply with
        mutable=["batch_stats"].
        """
        batch, views = images.shape[:2]
        # [B, V, H, W, 3] -> [B * V, H, W, 3], so that the batch stays divided over the devices
        images = images.reshape(batch * views, *images.shape[2:])
        features = self.image(images, train, views)
        features = features._replace(embedding=features.embedding.astype(jnp.float32))
        # [B * V, ...] -> [B, V, ...]
        return jax.tree.map(lambda x: x.reshape(batch, views, *x.shape[1:]), features)

    def encode_text(self, tokens: jax.Array) -> TextFeatures:
        """Tokens int32 [B, T, L] -> features [B, T, ...]."""
        batch, views, length = tokens.shape
        features = self.text(tokens.reshape(batch * views, length))  # [B, T, L] -> [B * T, L]
        features = features._replace(embedding=features.embedding.astype(jnp.float32))
        # [B * T, ...] -> [B, T, ...]
        return jax.tree.map(lambda x: x.reshape(batch, views, *x.shape[1:]), features)


def two_towers(model: Any, network: type[TwoTowers] = TwoTowers, **fields: Any) -> TwoTowers:
    """The towers that `config.model` describes, in a network.

    Args:
      model: a `Model`, or what one can be read of.
      network: `TwoTowers`, or a method's subclass with heads beside them.
      fields: the subclass's own.

    Raises ValueError: naming the field, its value and what was expected.
    """
    model = Model.read(model, "config.model")
    if model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError("config.model.attention='cudnn' must be 'xla' without an NVIDIA GPU.")
    shared = model.embed_dim, model.activation, model.compute
    towers = model.image.build(*shared), model.text.build(*shared)
    return network(*towers, model.init_logit_scale, model.init_logit_bias, **fields)
