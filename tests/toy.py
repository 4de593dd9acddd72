"""A method of two linear layers, for tests of what surrounds a method: it compiles in a second.

Images are their mean color, captions the count of their ids in a few classes. Everything else is
as in CLIP: the views, the loss, the metrics, the constraint. There is a running mean of the loss,
to have some state beside the parameters.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from configs import common
from declip_jax.losses.contrastive import normalize
from declip_jax.methods import base, clip
from declip_jax.models.features import ImageFeatures, TextFeatures

WIDTH, CLASSES = 16, 32


class Network(nn.Module):
    @classmethod
    def of(cls, model, loss):
        return cls()

    def setup(self):
        self.image = nn.Dense(WIDTH, use_bias=False)
        self.text = nn.Dense(WIDTH, use_bias=False)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6), ())

    def encode_image(self, images, train=False):  # [B, V, H, W, 3] -> [B, V, WIDTH]
        return ImageFeatures(self.image(images.mean(axis=(2, 3))), None, None)

    def encode_text(self, tokens):  # [B, T, L] -> [B, T, WIDTH]
        counts = jax.nn.one_hot(tokens % CLASSES, CLASSES).sum(axis=2)
        return TextFeatures(self.text(counts), None)

    def __call__(self, batch, train):
        image, text = self.encode_image(batch["image"]), self.encode_text(batch["tokens"])
        return {"image": normalize(image.embedding), "text": normalize(text.embedding)}


@base.once
def mean_after(x):
    loss = jax.lax.stop_gradient(clip.clip(x))
    return 0.9 * x.state["running_means"]["loss"] + 0.1 * loss


METHOD = clip.METHOD._replace(
    network=Network,
    state={
        "running_means": base.State(
            init=lambda rng, width, loss: {"loss": jnp.ones(())},
            update=lambda means, x: {"loss": mean_after(x)},
        )
    },
    metrics=lambda x: {"running_mean": mean_after(x)},
)


def config(**fields):
    """A run of four steps without evaluation; fields by dotted names, as {"data.source": …}."""
    config = common.get_config("tiny").unlock()
    config.method = "toy"
    config.eval.every = 0
    config.update_from_flattened_dict(fields)
    return config.lock()
