"""ALIP: Yang et al., Adaptive Language-Image Pre-training with Synthetic Caption,
https://arxiv.org/abs/2308.08428."""

from declip_jax.losses import adaptive
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
            "text": normalize(text.embedding),  # [B, 2, D]: raw, synthetic
        }


def build(config, mesh) -> Method:
    towers = two_towers(config.model)
    network = Network(towers.image, towers.text)
    encode = base.make_encode(network, config.microbatches)
    contrast = base.contrast(config, mesh)
    weights = base.check_weights(config.loss.weights, terms=("raw", "synthetic"))
    limits = base.logit_scale_limits(config.loss.logit_scale_range)
    momentum, gamma = config.loss.adaptive.momentum, config.loss.adaptive.gamma
    if not 0 <= momentum < 1:
        raise ValueError(f"config.loss.adaptive.momentum={momentum} must lie in 0 … 1.")
    if gamma < 0:
        raise ValueError(f"config.loss.adaptive.gamma={gamma} must be at least 0.")
    views = Views(image=("weak",), text=("caption", "synthetic"))
    functions = base.network_functions(network, config, views)

    def init(rng):
        params, model_state = functions["init"](rng)
        return params, {**model_state, "running_means": adaptive.initial_means()}

    def loss(params, model_state, batch, rng):
        del rng
        features, model_state = encode(params, model_state, batch)
        image, raw, synthetic = features["image"], features["text"][:, 0], features["text"][:, 1]
        scale = base.exp_scale(params["logit_scale"], config.loss.max_scale)
        gates, means = adaptive.gates(
            image, raw, synthetic, model_state["running_means"], momentum, gamma
        )

        terms = {
            "raw": clip_loss(image, raw, scale, gates.sample * gates.raw, contrast.info_nce),
            "synthetic": clip_loss(
                image, synthetic, scale, gates.sample * gates.synthetic, contrast.info_nce
            ),
        }

        total = base.weighted_sum(terms, weights)
        metrics = {
            "loss": total,
            **terms,
            "logit_scale": scale,
            "sample_weight": gates.sample.mean(),
            "raw_weight": gates.raw.mean(),
            "synthetic_weight": gates.synthetic.mean(),
            **base.accuracy(contrast.positive_rank(image, raw)),
        }
        return total, Aux(metrics, {**model_state, "running_means": means})

    return Method(
        views=views,
        loss=loss,
        constrain=lambda params: base.clamp_logit_scale(params, limits),
        **{**functions, "init": init},
    )
