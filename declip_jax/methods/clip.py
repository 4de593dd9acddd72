"""CLIP: Radford et al., Learning Transferable Visual Models From Natural Language Supervision."""

import jax.numpy as jnp

from declip_jax.losses.contrastive import clip_loss, normalise, retrieval_accuracy
from declip_jax.methods.base import (
    Aux,
    Method,
    Views,
    check_weights,
    clamp_logit_scale,
    logit_scale_limits,
    two_tower_functions,
    weighted_sum,
)
from declip_jax.models.two_towers import TwoTowers, two_towers


def build(config) -> Method:
    towers = two_towers(config.model)
    weights = check_weights(config.loss.weights, terms=("clip",))
    limits = logit_scale_limits(config.loss.logit_scale_range)

    def loss(params, extra, batch, rng):
        del rng  # nothing here is random
        image, extra = towers.apply(
            {"params": params, **extra},
            batch["image"][:, 0],  # [B, 1, H, W, 3] -> [B, H, W, 3]
            train=True,
            method=TwoTowers.encode_image,
            mutable=list(extra),
        )
        text = towers.apply(
            {"params": params},
            batch["tokens"][:, 0],  # [B, 1, L] -> [B, L]
            method=TwoTowers.encode_text,
        )
        image, text = normalise(image), normalise(text)  # [B, D]

        scale = jnp.exp(params["logit_scale"])
        terms = {"clip": clip_loss(image, text, scale)}
        total = weighted_sum(terms, weights)
        metrics = {"loss": total, **terms, "logit_scale": scale, **retrieval_accuracy(image, text)}
        return total, Aux(metrics, extra)

    return Method(
        views=Views(image=("weak",), text=("caption",)),
        loss=loss,
        project=lambda params: clamp_logit_scale(params, limits),
        **two_tower_functions(towers, config.model),
    )
