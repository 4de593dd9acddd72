"""An image tower and a text tower into one embedding space, and how a config describes them."""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from declip_jax.models.features import ImageFeatures, TextFeatures
from declip_jax.models.resnet import ModifiedResNet
from declip_jax.models.text import TextTransformer
from declip_jax.models.transformer import ACTIVATIONS, ATTENTION, REMAT
from declip_jax.models.vit import VisionTransformer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class TwoTowers(nn.Module):
    """Variables: "params" (float32: image/..., text/..., logit_scale) and, of the ResNet,
    "batch_stats". Embeddings are float32, whatever the towers compute in, and not normalized."""

    image: nn.Module
    text: nn.Module

    def setup(self) -> None:
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(-math.log(0.07)), ())

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


def two_towers(config: Any) -> TwoTowers:
    """The towers that the `model` section of a config describes.

    Raises:
      ValueError: naming the field, its value and what was expected.
    """

    def check(ok: bool, field: str, expected: str) -> None:
        if not ok:
            value = operator.attrgetter(field)(config)
            raise ValueError(f"model.{field}={value!r}: expected {expected}")

    def lookup(field: str, table: dict[str, Any]) -> Any:
        value = operator.attrgetter(field)(config)
        check(value in table, field, "one of " + ", ".join(map(repr, table)))
        return table[value]

    check(config.embed_dim >= 1, "embed_dim", "at least 1")
    lookup("activation", ACTIVATIONS)
    lookup("remat", REMAT)
    check(config.attention in ATTENTION, "attention", "one of " + ", ".join(map(repr, ATTENTION)))
    if config.attention == "cudnn":
        check(jax.default_backend() == "gpu", "attention", "'xla' where there is no NVIDIA GPU")
        check(config.dtype == "bfloat16", "attention", "'xla' unless model.dtype='bfloat16'")
    shared = dict(
        embed_dim=config.embed_dim,
        activation=config.activation,
        dtype=lookup("dtype", DTYPES),
        scan=config.scan,
        remat=config.remat,
        attention=config.attention,
    )

    def build(tower: type[nn.Module], section: str) -> nn.Module:
        """The tower with its own fields from config[section] and the shared ones it knows."""
        fields = {field.name for field in dataclasses.fields(tower)} - {"parent", "name"}
        sizes = {name: config[section][name] for name in config[section] if name != "kind"}
        if set(sizes) != fields - set(shared):
            raise ValueError(
                f"model.{section} has the fields {sorted(sizes)}: expected for a "
                f"{tower.__name__} {sorted(fields - set(shared))}"
            )
        for name in sorted(
            {"resolution", "patch", "width", "layers", "heads", "context"} & set(sizes)
        ):
            check(np.min(sizes[name]) >= 1, f"{section}.{name}", "at least 1")
        return tower(**sizes, **{name: shared[name] for name in fields & set(shared)})

    image = build(
        lookup("image.kind", {"vit": VisionTransformer, "resnet": ModifiedResNet}), "image"
    )
    if isinstance(image, VisionTransformer):
        fits = image.resolution % image.patch == 0
        check(fits, "image.resolution", f"a multiple of model.image.patch={image.patch}")
        fits = image.width % image.heads == 0
        check(fits, "image.width", f"a multiple of model.image.heads={image.heads}")
    else:
        check(len(image.layers) == 4, "image.layers", "four stages")
        check(image.resolution % 32 == 0, "image.resolution", "a multiple of 32")
        check(image.width % 2 == 0, "image.width", "an even number")
        fits = 32 * image.width % image.heads == 0
        check(fits, "image.heads", f"a divisor of 32 * model.image.width={32 * image.width}")
        check(image.bn_group_size >= 0, "image.bn_group_size", "0 (whole batch) or more")

    text = build(TextTransformer, "text")
    check(
        text.width % text.heads == 0, "text.width", f"a multiple of model.text.heads={text.heads}"
    )
    known = 0 <= text.eot_id < text.vocab_size
    check(known, "text.eot_id", f"an id below model.text.vocab_size={text.vocab_size}")
    for name in config.heads:
        check(config.heads[name] >= 1, f"heads.{name}", "at least 1")
    return TwoTowers(image, text)
