"""SLIP: Mu et al., Self-supervision meets Language-Image Pre-training,
https://arxiv.org/abs/2112.12750."""

from declip_jax.losses.contrastive import clip_loss, normalize
from declip_jax.losses.self_supervised import nt_xent
from declip_jax.methods import base
from declip_jax.methods.base import Aux, Method, Views
from declip_jax.models.heads import Mlp
from declip_jax.models.two_towers import TwoTowers, two_towers


class Network(TwoTowers):
    simclr: Mlp

    def __call__(self, batch, train):
        image = self.encode_image(batch["image"], train)
        text = self.encode_text(batch["tokens"])
        return {
            "image": normalize(image.embedding[:, 0]),  # [B, D], of the weak view
            "text": normalize(text.embedding[:, 0]),  # [B, D]
            "simclr": self.simclr(image.pooled[:, 1:], train),  # [B, 2, C], of the strong views
        }


def build(config, mesh) -> Method:
    towers = two_towers(config.model)
    heads = config.model.heads
    widths = (heads.simclr_hidden, heads.simclr_hidden, heads.simclr)
    simclr = Mlp(widths, last_norm=False, dtype=towers.image.dtype)
    network = Network(towers.image, towers.text, simclr)
    encode = base.make_encode(network, config.microbatches)
    contrast = base.contrast(config, mesh)
    weights = base.check_weights(config.loss.weights, terms=("clip", "simclr"))
    limits = base.logit_scale_limits(config.loss.logit_scale_range)
    temperature = config.loss.temperature
    if temperature <= 0:
        raise ValueError(f"config.loss.temperature={temperature} must be above 0.")
    views = Views(image=("weak", "strong", "strong"), text=("caption",))

    def loss(params, model_state, batch, rng):
        del rng
        features, model_state = encode(params, model_state, batch)
        image, text = features["image"], features["text"]
        h1, h2 = features["simclr"][:, 0], features["simclr"][:, 1]
        scale = base.exp_scale(params["logit_scale"], config.loss.max_scale)

        terms = {
            "clip": clip_loss(image, text, scale, info_nce=contrast.info_nce),
            "simclr": nt_xent(h1, h2, temperature, contrast.info_nce),
        }

        total = base.weighted_sum(terms, weights)
        accuracy = base.accuracy(contrast.positive_rank(image, text))
        return total, Aux({"loss": total, **terms, "logit_scale": scale, **accuracy}, model_state)

    return Method(
        views=views,
        loss=loss,
        constrain=lambda params: base.clamp_logit_scale(params, limits),
        **base.network_functions(network, config, views),
    )
