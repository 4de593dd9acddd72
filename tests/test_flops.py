"""The FLOP counts that benchmarks/step.py divides by."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops
from configs import common
from declip_jax.models.two_towers import Model, TwoTowers, two_towers

# GFLOPs a pair, forward and backward, of ViT-B/32, ViT-B/16 and RN50. Counted by hand beforehand,
# nothing frozen, at 4,096 pairs and 77 tokens, 32 in the rows that say so.
TABLE = {
    ("clip", 77): (44.1, 123.0, 52.6),
    ("slip", 77): (96.8, 333.6, 122.5),
    # The published weights train no projection, nor what RN50 pools with: 1.7 less.
    ("filip", 77): (56.9, 150.8, 63.8),
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
        count = flops.train_step_flops(config, tokens)
        assert count / config.batch_size / 1e9 == pytest.approx(expected, rel=0.01), tower


def test_frozen_patch_embedding_has_no_backward_pass():
    config = recipe("clip", "ViT-B/32")
    trained = flops.train_step_flops(config)
    config.optim.frozen = (r"^image/patch_embed/",)
    frozen = flops.train_step_flops(config)
    patch_embedding = 2 * 49 * (3 * 32 * 32) * 768
    assert trained - frozen == config.batch_size * patch_embedding


def test_weightless_term_is_only_computed_forward():
    config = recipe("filip", "ViT-B/32")
    metric = flops.train_step_flops(config)
    config.loss.weights.clip = 1.0
    width = config.model.embed_dim
    logits = 2 * config.batch_size**2 * width
    projections = config.batch_size * 2 * (768 + 512) * width  # which nothing else trains
    assert flops.train_step_flops(config) - metric == 2 * (logits + projections)


def test_what_is_computed_again_counts_once():
    config = recipe("declip", "ViT-B/32")
    config.batch_size = 256
    plain = flops.train_step_flops(config)
    config.update(microbatches=2)
    config.model.update(remat="full", scan=False)
    config.loss.ring_threshold = 1
    assert flops.train_step_flops(config) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("tower", ["ViT-B/32", "RN50"])
def test_forward_agrees_with_xla(tower):
    """XLA's count has elementwise work too, and leaves out what convolutions do on padding."""
    config = recipe("clip", tower).model
    config.scan = False  # XLA counts the body of a loop once
    config.text.layers = 2
    if tower.startswith("ViT"):
        config.image.layers = 2
    model = Model.read(config, "config.model")
    towers = two_towers(model)
    images = jnp.zeros((1, 1, model.image.resolution, model.image.resolution, 3))
    tokens = jnp.zeros((1, 1, model.text.context), jnp.int32)
    for encode, inputs, error in (
        (TwoTowers.encode_image, images, 0.04),
        (TwoTowers.encode_text, tokens, 0.02),
    ):

        def forward(variables, inputs, encode=encode):
            return towers.apply(variables, inputs, method=encode).embedding

        variables = jax.eval_shape(
            lambda inputs=inputs, encode=encode: towers.init(
                jax.random.key(0), inputs, method=encode
            )
        )
        theirs = jax.jit(forward).lower(variables, inputs).cost_analysis()["flops"]
        assert flops.count(forward, variables, inputs) == pytest.approx(theirs, rel=error)
