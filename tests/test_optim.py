import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from declip_jax import optim
from declip_jax.config import Config


def config(**changes):
    c = common.get_config().unlock()
    c.optim.update(changes)
    return c


def make_schedule(c):
    c = Config.read(c)
    return optim.make_schedule(c.optim, c.total_steps)


def make_optimizer(c, params):
    c = Config.read(c)
    return optim.make_optimizer(c.optim, c.total_steps, params)


PARAMS = {
    "logit_scale": jnp.float32(2.0),
    "image": {"patch_embed": {"kernel": jnp.ones((2, 3))}, "ln": {"scale": jnp.ones(3)}},
    "text": {"token_embedding": {"embedding": jnp.ones((4, 2))}, "proj": {"bias": jnp.ones(2)}},
}


def test_published_schedule():
    learning_rate = make_schedule(config())  # 1e-4 to 1e-3 in 2,500 of 128,000 steps
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
    np.testing.assert_allclose(make_schedule(c)(49), middle, rtol=1e-6)


def test_warmup_of_one_step_and_of_none():
    for warmup in (0, 1):
        c = config(warmup_steps=warmup)
        assert np.isfinite(float(make_schedule(c)(0)))


def torch_one_cycle(step, total, pct_start, peak):
    """Rate and b1 of torch's OneCycleLR with its defaults at a step from 0."""

    def anneal(start, end, share):
        return end + (start - end) / 2 * (math.cos(math.pi * share) + 1)

    top = pct_start * total - 1
    if step <= top:
        share = step / top
        return anneal(peak / 25, peak, share), anneal(0.95, 0.85, share)
    share = (step - top) / (total - 1 - top)
    return anneal(peak, peak / 25 / 1e4, share), anneal(0.85, 0.95, share)


def one_cycle(total=200, **changes):
    """As `torch_one_cycle` with pct_start 0.1 and a peak of 0.01."""
    c = config(
        schedule="one_cycle",
        peak_lr=0.01,
        warmup_lr=0.01 / 25,
        end_lr=0.01 / 25 / 1e4,
        warmup_steps=total // 10,
        **changes,
    )
    c.total_steps = total
    return c


def test_one_cycle_rate():
    learning_rate = make_schedule(one_cycle())
    for step in range(200):
        rate, _ = torch_one_cycle(step, 200, 0.1, 0.01)
        np.testing.assert_allclose(learning_rate(step), rate, rtol=1e-5, atol=1e-8)


def descend(c, start, grads):
    """The parameters after each of the updates."""
    params = {"kernel": jnp.asarray(start)}
    tx, _ = make_optimizer(c, params)
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append(np.asarray(params["kernel"]))
    return np.stack(seen)


@pytest.fixture
def start_and_grads():
    rng = np.random.default_rng(0)
    return rng.normal(size=5).astype(np.float32), rng.normal(size=(20, 5)).astype(np.float32)


def test_one_cycle_moves_b1_against_the_rate(start_and_grads):
    start, grads = start_and_grads
    p, m, v, expected = start.astype(float), 0.0, 0.0, []
    for n, g in enumerate(grads.astype(float), start=1):
        rate, b1 = torch_one_cycle(n - 1, 20, 0.1, 0.01)
        m = b1 * m + (1 - b1) * g
        v = 0.98 * v + 0.02 * g * g
        direction = m / (1 - b1**n) / (np.sqrt(v / (1 - 0.98**n)) + 1e-8)
        p = p - rate * (direction + 0.1 * p)
        expected.append(p)
    np.testing.assert_allclose(descend(one_cycle(20), start, grads), expected, rtol=1e-5)


def test_sgd_is_nesterov_with_coupled_decay(start_and_grads):
    start, grads = start_and_grads
    c = config(name="sgd", schedule="linear", warmup_steps=0, peak_lr=0.1, weight_decay=0.3)
    c.total_steps = 20
    p, buffer, expected = start.astype(float), 0.0, []
    for n, g in enumerate(grads.astype(float), start=1):
        g = g + 0.3 * p
        buffer = 0.9 * buffer + g
        p = p - 0.1 * (1 - n / 20) * (g + 0.9 * buffer)
        expected.append(p)
    np.testing.assert_allclose(descend(c, start, grads), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_same_path_as_torch(name, start_and_grads):
    torch = pytest.importorskip("torch")
    start, grads = start_and_grads
    if name == "sgd":
        c = config(name="sgd", schedule="constant", warmup_steps=0, peak_lr=0.1, weight_decay=0.3)
        options = dict(lr=0.1, momentum=0.9, weight_decay=0.3, nesterov=True)
    else:
        c = one_cycle(20)
        options = dict(betas=(0.9, 0.98), weight_decay=0.1)
    param = torch.nn.Parameter(torch.tensor(start))
    theirs = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]([param], **options)
    schedule = None
    if name == "adamw":
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            theirs, max_lr=0.01, total_steps=20, pct_start=0.1
        )
    expected = []
    for grad in grads:
        param.grad = torch.tensor(grad)
        theirs.step()
        if schedule is not None and len(expected) < 19:
            schedule.step()
        expected.append(param.detach().numpy().copy())
    np.testing.assert_allclose(descend(c, start, grads), expected, rtol=1e-5)


def test_first_lamb_update_has_the_length_of_each_layer():
    rng = np.random.default_rng(0)
    kernel = (
        jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32) * jnp.array([1, 10, 0])[:, None, None]
    )
    params = {
        "image": {"blocks": {"mlp": {"kernel": kernel, "bias": jnp.full((3, 4), 7.0)}}},
        "head": {"kernel": kernel},
    }
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    c = config(name="lamb", peak_lr=0.5, warmup_steps=0, schedule="constant", weight_decay=0.1)
    tx, _ = make_optimizer(c, params)
    updates, _ = tx.update(grads, tx.init(params), params)

    # Adam's first direction is the gradient's sign.
    directions = jax.tree.map(lambda g, p: np.sign(g) + 0.1 * p, grads, params)
    block = updates["image"]["blocks"]["mlp"]["kernel"]
    direction = directions["image"]["blocks"]["mlp"]["kernel"]
    for layer in (0, 1):  # ‖parameter‖ in the direction
        unit = direction[layer] / np.linalg.norm(direction[layer])
        expected = -0.5 * np.linalg.norm(kernel[layer]) * unit
        np.testing.assert_allclose(block[layer], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(block[2], -0.5 * direction[2], rtol=1e-4)  # a layer of zeros
    # What is not stacked is one layer, and what has no decay has no ratio.
    np.testing.assert_allclose(
        np.linalg.norm(updates["head"]["kernel"]), 0.5 * np.linalg.norm(kernel), rtol=1e-4
    )
    np.testing.assert_allclose(np.abs(updates["image"]["blocks"]["mlp"]["bias"]), 0.5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_learning_rate_rules(name):
    grads = jax.tree.map(jnp.ones_like, PARAMS)

    def updates(**changes):
        tx, _ = make_optimizer(config(name=name, **changes), PARAMS)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

    # The first pattern found decides.
    rules = (("^logit_scale$", 0.0), ("token_embedding", 0.1), ("text/", 3.0), ("", 1.0))
    plain, scaled = updates(), updates(lr_rules=rules, frozen=("patch_embed",))
    assert plain["logit_scale"] != 0 and scaled["logit_scale"] == 0
    for path, factor in {
        ("text", "token_embedding", "embedding"): 0.1,
        ("text", "proj", "bias"): 3.0,
        ("image", "ln", "scale"): 1.0,
        ("image", "patch_embed", "kernel"): 0.0,
    }.items():
        before, after = plain, scaled
        for part in path:
            before, after = before[part], after[part]
        np.testing.assert_allclose(after, factor * before, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"name": "adam"}, "config.optim.name='adam' is not one of ['adamw', 'lamb', 'sgd']"),
        ({"b2": 1.0}, "config.optim.b2=1.0 must lie in 0 … 1"),
        ({"momentum": -0.1}, "config.optim.momentum=-0.1"),
        ({"peak_lr": -1.0}, "config.optim.peak_lr=-1.0 must be at least 0"),
        ({"schedule": "one_cycle", "b1": 0.97}, "config.optim.b1=0.97 must lie in 0.05 … 0.95"),
        (
            {"lr_rules": (("logit", -1.0), ("", 1.0))},
            "('', 1.0)) has a factor below 0",
        ),
        ({"lr_rules": (("logit", 0.1),)}, "No pattern of config.optim.lr_rules covers: image/"),
        (
            {"lr_rules": (("logit_scal$", 0.1), ("", 1.0))},
            "config.optim.lr_rules: 'logit_scal$' finds no parameter. Did you mean 'logit_scale'",
        ),
        (
            {"lr_rules": ("logit_scale", 0.1)},
            "lr_rules=('logit_scale', 0.1): expected pairs",
        ),
        ({"lr_rules": ("ab", "cd")}, "config.optim.lr_rules=('ab', 'cd'): expected pairs"),
        ({"decay_rules": ("kernel$",)}, "config.optim.decay_rules=('kernel$',): expected pairs"),
        ({"decay_rules": (("kernel$", "no"),)}, "(('kernel$', 'no'),): expected pairs"),
        ({"schedule": "cosin"}, "config.optim.schedule='cosin'"),
        ({"warmup_steps": 200_000}, "config.optim.warmup_steps=200000"),
        ({"clip_norm": -1.0}, "config.optim.clip_norm"),
        ({"frozen": ("image/patch_embd",)}, "Did you mean 'image/patch_embed/kernel'"),
    ],
)
def test_wrong_settings_are_named(changes, named):
    with pytest.raises(ValueError) as error:
        make_optimizer(config(**changes), PARAMS)
    assert named in str(error.value)


def test_parameter_that_no_decay_rule_covers_is_refused():
    tx, _ = make_optimizer(config(), {**PARAMS, "odd": {"gamma": jnp.ones(2)}})
    with pytest.raises(
        ValueError, match="No pattern of config.optim.decay_rules covers: odd/gamma"
    ):
        jax.eval_shape(tx.init, {**PARAMS, "odd": {"gamma": jnp.ones(2)}})


def test_first_adamw_update_by_hand_with_decay_and_freezing():
    c = config(frozen=("patch_embed",), peak_lr=0.5, warmup_steps=0, schedule="constant")
    tx, _ = make_optimizer(c, PARAMS)
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
    frozen, _ = make_optimizer(config(frozen=("patch_embed",)), PARAMS)
    free, _ = make_optimizer(config(), PARAMS)
    size = lambda tx: sum(x.size for x in jax.tree.leaves(tx.init(PARAMS)))  # noqa: E731
    assert size(free) - size(frozen) == 2 * 6


def test_clipping_bounds_the_whole_gradient():
    c = config(clip_norm=1.0, eps=1e3, weight_decay=0.0, warmup_steps=0, schedule="constant")
    c.optim.peak_lr = 1e3  # with so large an eps, the update is nearly the clipped gradient
    tx, _ = make_optimizer(c, PARAMS)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 30.0), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in jax.tree.leaves(updates)))
    np.testing.assert_allclose(norm, 1.0, rtol=1e-2)
