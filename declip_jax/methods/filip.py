"""FILIP: Yao et al., Fine-grained Interactive Language-Image Pre-Training,
https://arxiv.org/abs/2111.07783, with the token selection of DeCLIP's published code."""

import math

from flax import linen as nn

from declip_jax.losses.contrastive import clip_loss, normalize, positive_rank_of
from declip_jax.losses.late_interaction import filip_loss
from declip_jax.methods import base
from declip_jax.methods.base import Aux, Method, Views
from declip_jax.models.heads import linear
from declip_jax.models.two_towers import TwoTowers, two_towers


class Network(TwoTowers):
    image_mapping: nn.Dense
    text_mapping: nn.Dense

    def setup(self):
        super().setup()
        start = nn.initializers.constant(-math.log(0.07))
        self.logit_scale_dense = self.param("logit_scale_dense", start, ())

    def __call__(self, batch, train):
        image = self.encode_image(batch["image"], train)
        text = self.encode_text(batch["tokens"])
        return {
            "image": normalize(image.embedding[:, 0]),  # [B, D]
            "text": normalize(text.embedding[:, 0]),  # [B, D]
            "patches": base.unit_tokens(self.image_mapping(image.tokens[:, 0])),  # [B, P, E]
            "words": base.unit_tokens(self.text_mapping(text.words[:, 0])),  # [B, L, E]
        }


def build(config, mesh) -> Method:
    towers, dense = two_towers(config.model), config.model.heads.dense
    network = Network(
        towers.image,
        towers.text,
        image_mapping=linear(towers.image.token_width, dense, towers.image.dtype),
        text_mapping=linear(towers.text.width, dense, towers.text.dtype),
    )
    encode = base.make_encode(network, config.microbatches)
    contrast = base.contrast(config, mesh)
    interact = base.late_interaction_of(config, mesh)
    weights = base.check_weights(config.loss.weights, terms=("clip", "filip"))
    limits = base.logit_scale_limits(config.loss.logit_scale_range)
    views = Views(
        image=("strong",),
        text=base.masked_views(config)[:1],
        padded=not config.loss.late_interaction.mask_padding,
    )

    def loss(params, model_state, batch, rng):
        del rng
        features, model_state = encode(params, model_state, batch)
        image, text = features["image"], features["text"]
        scale = base.exp_scale(params["logit_scale"], config.loss.max_scale)
        dense_scale = base.exp_scale(params["logit_scale_dense"], 0)
        similarities = interact(features["patches"], features["words"], batch["tokens"][:, 0])

        terms = {
            "clip": clip_loss(image, text, scale, info_nce=contrast.info_nce),
            "filip": filip_loss(*similarities, dense_scale),
        }

        total = base.weighted_sum(terms, weights)
        # The similarities that are trained, whatever the weights.
        accuracy = base.accuracy(positive_rank_of(similarities[0]))
        metrics = {"loss": total, **terms, "logit_scale": scale, "logit_scale_dense": dense_scale}
        return total, Aux({**metrics, **accuracy}, model_state)

    return Method(
        views=views,
        loss=loss,
        constrain=lambda params: base.clamp_logit_scale(params, limits),
        **base.network_functions(network, config, views),
    )
