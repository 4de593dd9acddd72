"""DeCLIP: Li et al., Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image
Pre-training Paradigm, https://arxiv.org/abs/2110.05208."""

import jax.numpy as jnp
from flax import linen as nn

from declip_jax import support_set
from declip_jax.losses.contrastive import nearest_neighbor_loss
from declip_jax.losses.language import masked_lm
from declip_jax.losses.self_supervised import simsiam as simsiam_loss
from declip_jax.methods.base import Definition, Inputs, Network, State, Views, once
from declip_jax.models.heads import Mlp, linear


class DeclipNetwork(Network):
    projector: Mlp
    predictor: Mlp
    mlm_head: nn.Dense
    mlm_capacity: float

    @classmethod
    def heads(cls, model, loss):
        widths, dtype = model.heads, model.compute.dtype
        return {
            **super().heads(model, loss),
            "projector": Mlp((widths.projector,) * 3, last_norm=True, dtype=dtype),
            "predictor": Mlp((widths.predictor, widths.projector), last_norm=False, dtype=dtype),
            "mlm_head": linear(model.text.width, model.text.vocab_size, dtype),
            "mlm_capacity": loss.mlm_capacity,
        }

    def features(self, image, text, batch, train):  # the last texts: masked, augmented
        projected = self.projector(image.embedding, train)
        words, labels = text.words[:, -2], batch["mlm_labels"]
        return {
            **super().features(image, text, batch, train),
            "projected": projected,  # [B, 2, C]
            "predicted": self.predictor(projected, train),  # [B, 2, C]
            "masked": masked_lm(self.mlm_head, words, labels, self.mlm_capacity),
        }


def clip(x: Inputs):
    v1, v2, t, a = x.image(0), x.image(1), x.text(0), x.text(-1)  # a: augmented captions
    return (x.contrast(v1, t) + x.contrast(v2, t) + x.contrast(v1, a) + x.contrast(v2, a)) / 4


def simsiam(x: Inputs):
    p, z = x.features["predicted"], x.features["projected"]
    return simsiam_loss(p[:, 0], p[:, 1], z[:, 0], z[:, 1])


def mlm(x: Inputs):
    return x.features["masked"].mean()


def nn_text(x: Inputs):
    def near(image, neighbors):
        return nearest_neighbor_loss(image, neighbors, x.scales["logit_scale"], x.info_nce)

    v1, v2, (nn_t, nn_a) = x.image(0), x.image(1), neighbors(x)[0]
    return (near(v1, nn_t) + near(v2, nn_t) + near(v1, nn_a) + near(v2, nn_a)) / 4


@once
def neighbors(x: Inputs):
    """([B, k, D] of captions, of augmented captions), looked up in the set as it is; metrics."""
    options, rows, texts = x.loss.support_set, x.state["support_set"], (x.text(0), x.text(-1))
    queries = jnp.stack(texts, axis=1).reshape(-1, x.model.embed_dim)  # 2 × [B, D] -> [2B, D]
    found = support_set.nearest(rows, queries, options.neighbors, mesh=x.mesh, block=x.loss.block)
    both = found.rows.reshape(-1, 2, *found.rows.shape[1:])  # [2B, k, D] -> [B, 2, k, D]
    young = options.young_steps * len(queries)
    return (both[:, 0], both[:, 1]), support_set.metrics(found, rows, young_rows=young)


def enqueue(rows: support_set.State, x: Inputs) -> support_set.State:
    """The augmented captions enter first, then the captions."""
    return support_set.enqueue(rows, jnp.concatenate([x.text(-1), x.text(0)]), mesh=x.mesh)


SUPPORT_SET = State(
    init=lambda rng, width, loss: support_set.init(rng, loss.support_set.size, width),
    update=enqueue,
    check=lambda loss, batch_size, devices: support_set.check(
        loss.support_set.size, devices, 2 * batch_size, loss.support_set.neighbors
    ),
)
METHOD = Definition(
    views=lambda loss: Views(
        image=("strong", "strong"),
        # As published, the masked caption is contrasted.
        text=("masked", "augmented")
        if loss.contrast_masked
        else ("caption", "masked", "augmented"),
    ),
    network=DeclipNetwork,
    terms={"clip": clip, "simsiam": simsiam, "mlm": mlm, "nn_text": nn_text},
    state={"support_set": SUPPORT_SET},
    metrics=lambda x: {"mlm_dropped": x.features["masked"].dropped.sum(), **neighbors(x)[1]},
)
