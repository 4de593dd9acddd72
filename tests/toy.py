"""A method of two linear layers, for tests of what surrounds a method: it compiles in a second.

Images are their mean color, captions the count of their ids in a few classes. Everything else is
as in CLIP: the views, the loss, the metrics, the constraint. There is a running mean of the loss,
to have some state beside the parameters.
"""

import jax
import jax.numpy as jnp

from configs import common
from declip_jax.losses.contrastive import clip_loss, normalize
from declip_jax.methods import base
from declip_jax.methods.base import Aux, Method, Views

WIDTH, CLASSES = 16, 32


def build(config, mesh) -> Method:
    contrast = base.contrast(config, mesh)
    weights = base.check_weights(config.loss.weights, terms=("clip",))
    limits = base.logit_scale_limits(config.loss.logit_scale_range)

    def init(rng):
        image, text = jax.random.split(rng)
        params = {
            "image": {"kernel": jax.random.normal(image, (3, WIDTH))},
            "text": {"kernel": jax.random.normal(text, (CLASSES, WIDTH))},
            "logit_scale": jnp.full((), 2.6),
        }
        return params, {"running_means": {"loss": jnp.ones(())}}

    def encode_image(params, model_state, images):  # [B, H, W, 3] -> [B, WIDTH]
        return normalize(images.mean(axis=(1, 2)) @ params["image"]["kernel"])

    def encode_text(params, model_state, tokens):  # [B, L] -> [B, WIDTH]
        counts = jax.nn.one_hot(tokens % CLASSES, CLASSES).sum(axis=1)
        return normalize(counts @ params["text"]["kernel"])

    def loss(params, model_state, batch, rng):
        image = encode_image(params, model_state, batch["image"][:, 0])
        text = encode_text(params, model_state, batch["tokens"][:, 0])
        scale = base.exp_scale(params["logit_scale"], config.loss.max_scale)
        terms = {"clip": clip_loss(image, text, scale, info_nce=contrast.info_nce)}
        total = base.weighted_sum(terms, weights)
        accuracy = base.accuracy(contrast.positive_rank(image, text))
        mean = 0.9 * model_state["running_means"]["loss"] + 0.1 * jax.lax.stop_gradient(total)
        metrics = {"loss": total, **terms, "logit_scale": scale, "running_mean": mean, **accuracy}
        return total, Aux(metrics, {"running_means": {"loss": mean}})

    return Method(
        views=Views(image=("weak",), text=("caption",)),
        init=init,
        loss=loss,
        constrain=lambda params: base.clamp_logit_scale(params, limits),
        encode_image=encode_image,
        encode_text=encode_text,
    )


def config(**fields):
    """A run of four steps without evaluation; fields by dotted names, as {"data.source": …}."""
    config = common.get_config("tiny").unlock()
    config.method = "toy"
    config.eval.every = 0
    config.update_from_flattened_dict(fields)
    return config.lock()
