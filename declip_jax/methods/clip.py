"""CLIP: Radford et al., Learning Transferable Visual Models From Natural Language Supervision."""

from declip_jax.losses.contrastive import clip_loss, normalize
from declip_jax.methods import base
from declip_jax.methods.base import Aux, Method, Views
from declip_jax.models.two_towers import TwoTowers, two_towers


class Network(TwoTowers):
    def __call__(self, batch, train):
        image = self.encode_image(batch["image"], train)
        text = self.encode_text(batch["tokens"])
        return {
            "image": normalize(image.embedding[:, 0]),  # [B, D]
            "text": normalize(text.embedding[:, 0]),  # [B, D]
        }


def build(config, mesh) -> Method:
    towers = two_towers(config.model)
    network = Network(towers.image, towers.text)
    encode = base.make_encode(network, config.microbatches)
    contrast = base.contrast(config, mesh)
    weights = base.check_weights(config.loss.weights, terms=("clip",))
    limits = base.logit_scale_limits(config.loss.logit_scale_range)
    views = Views(image=("weak",), text=("caption",))

    def loss(params, model_state, batch, rng):
        del rng  # nothing here is random
        features, model_state = encode(params, model_state, batch)
        image, text = features["image"], features["text"]
        scale = base.exp_scale(params["logit_scale"], config.loss.max_scale)

        terms = {"clip": clip_loss(image, text, scale, info_nce=contrast.info_nce)}

        total = base.weighted_sum(terms, weights)
        accuracy = base.accuracy(contrast.positive_rank(image, text))
        return total, Aux({"loss": total, **terms, "logit_scale": scale, **accuracy}, model_state)

    return Method(
        views=views,
        loss=loss,
        constrain=lambda params: base.clamp_logit_scale(params, limits),
        **base.network_functions(network, config, views),
    )
