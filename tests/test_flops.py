"""The analytic FLOP counts that benchmarks/step.py divides by."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops
from configs import common
from declip_jax import methods
from declip_jax.models.two_towers import TwoTowers, two_towers
from declip_jax.parallel.mesh import make_mesh

# GFLOPs a pair, forward and backward, of ViT-B/32, ViT-B/16 and RN50. Counted by hand beforehand,
# nothing frozen, at 4,096 pairs and 77 tokens, 32 in the rows that say so.
TABLE = {
    ("clip", 77): (44.1, 123.0, 52.6),
    ("slip", 77): (96.8, 333.6, 122.5),
    ("filip", 77): (56.9, 150.8, 65.5),
    ("declip", 77): (88.8, 246.6, 106.0),
    ("alip", 77): (62.0, 140.9, 70.5),
    ("clip", 32): (33.6,),
    ("declip", 32): (67.7,),
}
TOWERS = ("ViT-B/32", "ViT-B/16", "RN50")


def recipe(method: str, tower: str):
    config = importlib.import_module(f"configs.{method}_vit_b32_yfcc15m").get_config().unlock()
    common.set_variant(config, tower)
    config.optim.frozen = ()
    return config


@pytest.mark.parametrize(("method", "tokens"), TABLE)
def test_matches_counts_by_hand(method, tokens):
    for tower, expected in zip(TOWERS, TABLE[method, tokens], strict=False):
        config = recipe(method, tower)
        views = methods.build(config, make_mesh(-1, 1)).views
        count = flops.train_step_flops(config, (len(views.image), len(views.text)), tokens)
        assert count / config.batch_size / 1e9 == pytest.approx(expected, rel=0.01), tower


def test_frozen_patch_embedding_has_no_backward_pass():
    config = recipe("clip", "ViT-B/32")
    trained = flops.train_step_flops(config, (1, 1))
    config.optim.frozen = (r"^image/patch_embed/",)
    frozen = flops.train_step_flops(config, (1, 1))
    patch_embedding = 2 * 49 * (3 * 32 * 32) * 768
    assert trained - frozen == config.batch_size * patch_embedding


def test_weightless_term_is_only_computed_forward():
    config = recipe("filip", "ViT-B/32")
    metric = flops.train_step_flops(config, (1, 1))
    config.loss.weights.clip = 1.0
    assert flops.train_step_flops(config, (1, 1)) - metric == 2 * (
        2 * config.batch_size**2 * config.model.embed_dim
    )


def test_unknown_term_is_refused():
    config = recipe("clip", "ViT-B/32")
    config.loss.weights = {"clip": 1.0, "other": 1.0}
    with pytest.raises(ValueError, match="'other'"):
        flops.train_step_flops(config, (1, 1))


@pytest.mark.parametrize("tower", ["ViT-B/32", "RN50"])
def test_forward_agrees_with_xla(tower):
    """XLA's count has elementwise work too, and leaves out what convolutions do on padding."""
    model = recipe("clip", tower).model
    model.scan = False  # XLA counts the body of a loop once
    model.text.layers = 2
    if model.image.kind == "vit":
        model.image.layers = 2
    towers = two_towers(model)
    images = jnp.zeros((1, 1, model.image.resolution, model.image.resolution, 3))
    tokens = jnp.zeros((1, 1, model.text.context), jnp.int32)

    def xla_flops(encode, inputs):
        def forward(variables, inputs):
            return towers.apply(variables, inputs, method=encode).embedding

        variables = jax.eval_shape(lambda: towers.init(jax.random.key(0), inputs, method=encode))
        return jax.jit(forward).lower(variables, inputs).cost_analysis()["flops"]

    count = {"vit": flops.vit, "resnet": flops.resnet}[model.image.kind]
    image = count(model.image, model.embed_dim)
    text = flops.text(model.text, model.embed_dim, model.text.context)
    assert image.first + image.rest == pytest.approx(
        xla_flops(TwoTowers.encode_image, images), rel=0.04
    )
    assert text.rest == pytest.approx(xla_flops(TwoTowers.encode_text, tokens), rel=0.02)
