"""An image tower and a text tower into one embedding space, and how a config describes them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models.resnet import ModifiedResNet
from declip_jax.models.text import TextTransformer
from declip_jax.models.transformer import ACTIVATIONS, REMAT
from declip_jax.models.vit import VisionTransformer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class TwoTowers(nn.Module):
    """Variables: "params" (float32: image/..., text/..., logit_scale) and, of the ResNet,
    "batch_stats". Features are float32, whatever the towers compute in, and not normalised."""

    image: nn.Module
    text: nn.Module

    def setup(self) -> None:
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(-math.log(0.07)), ())

    def encode_image(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Images float [B, H, W, 3], normalised as in training -> float32 [B, D].

        With train=True batch normalisation uses the batch's statistics and updates the running
        ones: apply with mutable=["batch_stats"].
        """
        return self.image(images, train).astype(jnp.float32)

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 [B, L] -> float32 [B, D]."""
        return self.text(tokens).astype(jnp.float32)

    def __call__(self, images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encode_image(images), self.encode_text(tokens)


def two_towers(config: Any) -> TwoTowers:
    """The model that the `model` section of a config describes.

    Raises:
      ValueError: naming the field, its value and what was expected.
    """

    def check(ok: bool, field: str, value: Any, expected: str) -> None:
        if not ok:
            raise ValueError(f"model.{field}={value!r}: expected {expected}")

    def one_of(table: dict[str, Any], field: str, value: str) -> Any:
        check(value in table, field, value, "one of " + ", ".join(map(repr, table)))
        return table[value]

    one_of(ACTIVATIONS, "activation", config.activation)
    one_of(REMAT, "remat", config.remat)
    shared = {"embed_dim": config.embed_dim, "dtype": one_of(DTYPES, "dtype", config.dtype)}
    blocks = {"activation": config.activation, "scan": config.scan, "remat": config.remat}

    image = dict(config.image)
    tower = one_of(
        {"vit": VisionTransformer, "resnet": ModifiedResNet}, "image.kind", image.pop("kind")
    )
    if tower is VisionTransformer:
        check(
            image["resolution"] % image["patch"] == 0,
            "image.resolution",
            image["resolution"],
            f"a multiple of model.image.patch={image['patch']}",
        )
        check(
            image["width"] % image["heads"] == 0,
            "image.width",
            image["width"],
            f"a multiple of model.image.heads={image['heads']}",
        )
        image_tower = VisionTransformer(**image, **shared, **blocks)
    else:
        image["layers"] = tuple(image["layers"])
        check(len(image["layers"]) == 4, "image.layers", image["layers"], "four stages")
        check(image["width"] % 2 == 0, "image.width", image["width"], "an even number")
        check(
            image["resolution"] % 32 == 0, "image.resolution", image["resolution"], "a multiple of 32"
        )
        check(
            32 * image["width"] % image["heads"] == 0,
            "image.heads",
            image["heads"],
            f"a divisor of 32 * model.image.width={32 * image['width']}",
        )
        image_tower = ModifiedResNet(**image, **shared)

    text = dict(config.text)
    check(
        text["width"] % text["heads"] == 0,
        "text.width",
        text["width"],
        f"a multiple of model.text.heads={text['heads']}",
    )
    check(
        0 <= text["eot_id"] < text["vocab_size"],
        "text.eot_id",
        text["eot_id"],
        f"an id below model.text.vocab_size={text['vocab_size']}",
    )
    return TwoTowers(image_tower, TextTransformer(**text, **shared, **blocks))
