import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from declip_jax import optim


def config(**changes):
    c = common.get_config().unlock()
    c.optim.update(changes)
    return c


PARAMS = {
    "logit_scale": jnp.float32(2.0),
    "image": {"patch_embed": {"kernel": jnp.ones((2, 3))}, "ln": {"scale": jnp.ones(3)}},
    "text": {"token_embedding": {"embedding": jnp.ones((4, 2))}, "proj": {"bias": jnp.ones(2)}},
}


def test_published_schedule():
    learning_rate = optim.make_schedule(config())  # 1e-4 to 1e-3 in 2,500 of 128,000 steps
    published = {1: 1e-4, 2: 1e-4 + 9e-4 / 2499, 1250: 1e-4 + 9e-4 * 1249 / 2499, 2500: 1e-3}
    for n in (2501, 65_250, 127_999, 128_000):
        published[n] = 1e-3 * (1 + math.cos(math.pi * (n - 2500) / 125_500)) / 2
    for n, value in published.items():
        np.testing.assert_allclose(learning_rate(n - 1), value, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    "schedule, middle", [("linear", 0.55), ("constant", 1.0), ("cosine", 0.55)]
)
def test_other_schedules(schedule, middle):
    c = config(schedule=schedule, peak_lr=1.0, end_lr=0.1, warmup_steps=0)
    c.total_steps = 100
    np.testing.assert_allclose(optim.make_schedule(c)(49), middle, rtol=1e-6)


def test_warmup_of_one_step_and_of_none():
    for warmup in (0, 1):
        c = config(warmup_steps=warmup)
        assert np.isfinite(float(optim.make_schedule(c)(0)))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"schedule": "cosin"}, "config.optim.schedule='cosin'"),
        ({"warmup_steps": 200_000}, "config.optim.warmup_steps=200000"),
        ({"clip_norm": -1.0}, "config.optim.clip_norm"),
        ({"frozen": ("image/patch_embd",)}, "did you mean 'image/patch_embed/kernel'"),
    ],
)
def test_wrong_settings_are_named(changes, named):
    with pytest.raises(ValueError) as error:
        optim.make_optimizer(config(**changes), PARAMS)
    assert named in str(error.value)


def test_parameter_that_no_decay_rule_covers_is_refused():
    tx, _ = optim.make_optimizer(config(), {**PARAMS, "odd": {"gamma": jnp.ones(2)}})
    with pytest.raises(
        ValueError, match="No pattern of config.optim.decay_rules covers: odd/gamma"
    ):
        jax.eval_shape(tx.init, {**PARAMS, "odd": {"gamma": jnp.ones(2)}})


def test_first_adamw_update_by_hand_with_decay_and_freezing():
    c = config(frozen=("patch_embed",), peak_lr=0.5, warmup_steps=0, schedule="constant")
    tx, _ = optim.make_optimizer(c, PARAMS)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    # After bias correction the first step is the gradient's sign; decay 0.1 · parameter where
    # the rules say so.
    np.testing.assert_allclose(
        updates["text"]["token_embedding"]["embedding"], -0.5 * 1.1, rtol=1e-5
    )
    np.testing.assert_allclose(updates["text"]["proj"]["bias"], -0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["image"]["ln"]["scale"], -0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["logit_scale"], -0.5, rtol=1e-5)
    np.testing.assert_array_equal(updates["image"]["patch_embed"]["kernel"], 0)


def test_frozen_parameters_have_no_moments():
    frozen, _ = optim.make_optimizer(config(frozen=("patch_embed",)), PARAMS)
    free, _ = optim.make_optimizer(config(), PARAMS)
    size = lambda tx: sum(x.size for x in jax.tree.leaves(tx.init(PARAMS)))  # noqa: E731
    assert size(free) - size(frozen) == 2 * 6


def test_clipping_bounds_the_whole_gradient():
    c = config(clip_norm=1.0, eps=1e3, weight_decay=0.0, warmup_steps=0, schedule="constant")
    c.optim.peak_lr = 1e3  # with so large an eps, the update is nearly the clipped gradient
    tx, _ = optim.make_optimizer(c, PARAMS)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 30.0), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in jax.tree.leaves(updates)))
    np.testing.assert_allclose(norm, 1.0, rtol=1e-2)
