"""DeFILIP: Cui et al., Democratizing Contrastive Language-Image Pre-training: A CLIP Benchmark of
Data, Model, and Supervision, https://arxiv.org/abs/2203.05796: DeCLIP and FILIP's loss."""

import math

import jax
from flax import linen as nn

from declip_jax.losses.contrastive import clip_loss, nearest_neighbor_loss, normalize
from declip_jax.losses.language import masked_lm
from declip_jax.losses.late_interaction import filip_loss
from declip_jax.losses.self_supervised import simsiam
from declip_jax.methods import base
from declip_jax.methods.base import Aux, Method, Views
from declip_jax.models.heads import Mlp, linear
from declip_jax.models.two_towers import TwoTowers, two_towers


class Network(TwoTowers):
    projector: Mlp
    predictor: Mlp
    mlm_head: nn.Dense
    mlm_capacity: float
    image_mapping: nn.Dense
    text_mapping: nn.Dense

    def setup(self):
        super().setup()
        start = nn.initializers.constant(-math.log(0.07))
        self.logit_scale_dense = self.param("logit_scale_dense", start, ())

    def __call__(self, batch, train):
        image = self.encode_image(batch["image"], train)  # [B, 2, ...], both strong
        text = self.encode_text(batch["tokens"])  # [B, T, ...], the last two masked, augmented
        projected = self.projector(image.embedding, train)
        words, labels = text.words[:, -2], batch["mlm_labels"]
        return {
            "image": normalize(image.embedding),  # [B, 2, D]
            "text": normalize(text.embedding),  # [B, T, D]
            "projected": projected,  # [B, 2, C]
            "predicted": self.predictor(projected, train),  # [B, 2, C]
            "masked": masked_lm(self.mlm_head, words, labels, self.mlm_capacity),
            "patches": base.unit_tokens(self.image_mapping(image.tokens)),  # [B, 2, P, E]
            "words": base.unit_tokens(self.text_mapping(text.words)),  # [B, T, L, E]
        }


def build(config, mesh) -> Method:
    towers, heads = two_towers(config.model), config.model.heads
    dtype = towers.image.dtype
    network = Network(
        towers.image,
        towers.text,
        projector=Mlp((heads.projector,) * 3, last_norm=True, dtype=dtype),
        predictor=Mlp((heads.predictor, heads.projector), last_norm=False, dtype=dtype),
        mlm_head=linear(towers.text.width, towers.text.vocab_size, dtype),
        mlm_capacity=config.loss.mlm_capacity,
        image_mapping=linear(towers.image.token_width, heads.dense, dtype),
        text_mapping=linear(towers.text.width, heads.dense, dtype),
    )
    encode = base.make_encode(network, config.microbatches)
    info_nce, positive_rank = base.contrast(config, mesh)
    support_set = base.SupportSet(config, mesh)
    interact = base.late_interaction_of(config, mesh)
    all_views = config.loss.late_interaction.all_views
    weights = base.check_weights(
        config.loss.weights, terms=("clip", "simsiam", "mlm", "nn_text", "filip")
    )
    limits = base.logit_scale_limits(config.loss.logit_scale_range)
    views = Views(
        image=("strong", "strong"),
        text=(*base.masked_views(config), "augmented"),
        padded=not config.loss.late_interaction.mask_padding,
    )
    functions = base.network_functions(network, config, views)

    def init(rng):
        params, model_state = functions["init"](rng)
        rows = support_set.init(jax.random.fold_in(rng, 1))
        return params, {**model_state, "support_set": rows}

    def loss(params, model_state, batch, rng):
        del rng  # the pipeline draws what is masked and augmented
        features, model_state = encode(params, model_state, batch)
        v1, v2 = features["image"][:, 0], features["image"][:, 1]  # [B, D]
        t, a = features["text"][:, 0], features["text"][:, -1]  # captions, augmented captions
        p1, p2 = features["predicted"][:, 0], features["predicted"][:, 1]
        z1, z2 = features["projected"][:, 0], features["projected"][:, 1]
        nn_t, nn_a, nn_metrics = support_set.look_up(model_state["support_set"], t, a)
        scale = base.exp_scale(params["logit_scale"], config.loss.max_scale)
        dense_scale = base.exp_scale(params["logit_scale_dense"], 0)

        def pair(image, text):
            return clip_loss(image, text, scale, info_nce=info_nce)

        def near(image, neighbors):
            return nearest_neighbor_loss(image, neighbors, scale, info_nce)

        def dense(image, text):
            patches, words = features["patches"][:, image], features["words"][:, text]
            return filip_loss(*interact(patches, words, batch["tokens"][:, text]), dense_scale)

        terms = {
            "clip": (pair(v1, t) + pair(v2, t) + pair(v1, a) + pair(v2, a)) / 4,
            "simsiam": simsiam(p1, p2, z1, z2),
            "mlm": features["masked"].mean(),
            "nn_text": (near(v1, nn_t) + near(v2, nn_t) + near(v1, nn_a) + near(v2, nn_a)) / 4,
            "filip": (dense(0, 0) + dense(1, 0) + dense(0, -1) + dense(1, -1)) / 4
            if all_views
            else dense(0, 0),
        }

        total = base.weighted_sum(terms, weights)
        metrics = {
            "loss": total,
            **terms,
            "logit_scale": scale,
            "logit_scale_dense": dense_scale,
            "mlm_dropped": features["masked"].dropped.sum(),
            **nn_metrics,
            **base.accuracy(positive_rank(v1, t)),
        }
        rows = support_set.enqueue(model_state["support_set"], t, a)
        return total, Aux(metrics, {**model_state, "support_set": rows})

    return Method(
        views=views,
        loss=loss,
        constrain=lambda params: base.clamp_logit_scale(params, limits),
        **{**functions, "init": init},
    )
