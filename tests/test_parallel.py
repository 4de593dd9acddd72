"""Sharded equals unsharded: eight devices in every mesh shape against one."""

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from configs import common
from declip_jax import optim
from declip_jax.methods import METHODS
from declip_jax.parallel import mesh as meshes
from declip_jax.parallel import rules
from declip_jax.parallel.mesh import replicated, shard_batch
from declip_jax.step import Setup, make_init
from tests.drawn import draw_variables
from tests.hlo import largest_collective

pytestmark = pytest.mark.mesh

KINDS = [*((method, "vit") for method in METHODS), ("clip", "resnet"), ("declip", "resnet")]
BATCH, CONTEXT, EOT = 16, 16, 63


def config(method, kind="vit", shape=(1, 1)):
    c = common.get_config("tiny").unlock()
    c.method, c.loss.weights = method, dict.fromkeys(METHODS[method].terms, 1.0)
    c.batch_size = BATCH
    c.mesh.update(data=shape[0], fsdp=shape[1])
    if kind == "resnet":
        c.model.image = dict(
            kind="resnet", resolution=32, width=8, layers=(1, 1, 1, 1), heads=4, bn_group_size=0
        )
    else:
        c.model.image.layers = 1
    c.model.text.update(layers=1, vocab_size=EOT + 1, eot_id=EOT, context=CONTEXT)
    c.loss.support_set.size = 40  # a step enqueues 32 rows: the second step wraps, and the third
    # Augmentation does not know the method; one of them has it.
    c.views.strong.update(jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0)
    if (method, kind) == ("clip", "vit"):
        c.views.weak.update(flip=0.5, jitter_prob=0.8, grayscale_prob=0.2)
    return c


def batches(views, count=3):
    rng = np.random.default_rng(0)
    place = np.arange(CONTEXT)
    for _ in range(count):
        images, texts = (BATCH, len(views.image)), (BATCH, len(views.text))
        colors = rng.integers(0, 206, (*images, 1, 1, 3))
        pixels = colors + rng.integers(0, 50, (*images, 32, 32, 3))
        end = rng.integers(4, CONTEXT, (*texts, 1))
        words = rng.integers(1, EOT, (*texts, CONTEXT))
        tokens = np.where(place < end, words, np.where(place == end, EOT, 0)).astype(np.int32)
        batch = {"image": pixels.astype(np.uint8), "tokens": tokens}
        if "masked" in views.text:
            chosen = (place < end[:, 0]) & (rng.random((BATCH, CONTEXT)) < 0.15)
            batch["mlm_labels"] = np.where(chosen, tokens[:, 0], -1)
        yield batch


def gradient_descent(section, total_steps, params):
    """In place of the run's optimizer, to see the gradients: they are the state that it keeps.

    Its steps are small and in proportion to them. Adam's first step is as long for a gradient of
    which only rounding is left (that of an attention's key bias) as for any other: two meshes
    would go different ways, and what comes after would not be comparable.
    """
    del section, total_steps, params
    rate = 1e-4

    def update(gradients, state, params=None):
        del state, params
        return jax.tree.map(lambda g: -rate * g, gradients), gradients

    return optax.GradientTransformation(optax.tree.zeros_like, update), lambda count: rate


def compile_step(c):
    setup = Setup(c, jax.devices()[: c.mesh.data * c.mesh.fsdp])
    batch = shard_batch(next(batches(setup.method.views)), setup.mesh)
    step = setup.jit_train_step().lower(setup.abstract_state, batch)
    return setup, step.compile()


def start_of(setup, kind):
    """A state to begin with. Values that are drawn spare the compiling of `init`; not a ResNet's,
    in which what rounding does to a ReLU near zero would be too large a part of the gradient."""
    if kind == "resnet":
        return jax.device_get(
            jax.jit(make_init(setup.method, setup.tx, setup.config.seed, ema=False))()
        )
    params, model_state = draw_variables(setup.method)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), setup.abstract_state)
    return state.replace(params=params, model_state=model_state, rng=np.array([0, 1], np.uint32))


def three_steps(setup, train_step, start):
    """Metrics and gradients of three steps, and the state after them."""
    state = jax.device_put(start, setup.state_shardings)
    metrics, gradients = [], []
    for batch in batches(setup.method.views):
        state, step_metrics = train_step(state, shard_batch(batch, setup.mesh))
        metrics.append(jax.device_get(step_metrics))
        gradients.append(jax.device_get(state.opt_state))
    return metrics, gradients, state


def assert_near(ours, expected):
    assert ours.keys() == expected.keys()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected
    )


@pytest.mark.parametrize("method, kind", KINDS)
def test_sharded_equals_one_device(method, kind):
    # What divides batch and state is common to all methods: two of them go through every mesh.
    every = kind == "vit" and method in ("clip", "declip")
    shapes = [(2, 4), (8, 1), (1, 8)] if every else [(2, 4)]
    configs = [config(method, kind, shape) for shape in [(1, 1), *shapes]]
    configs[1].loss.update(ring_threshold=BATCH, block=1)
    with mock.patch.object(optim, "make_optimizer", gradient_descent), ThreadPoolExecutor() as pool:
        (one, one_step), *sharded = pool.map(compile_step, configs)
    start = start_of(one, kind)
    one_metrics, one_gradients, one_state = three_steps(one, one_step, start)
    if kind == "vit":
        assert set(start.model_state) - {"batch_stats"} == set(METHODS[method].state)
    if "support_set" in start.model_state:
        assert one_state.model_state["support_set"]["pointer"] == 3 * 2 * BATCH % 40
        assert one_state.model_state["support_set"]["filled"] == 40

    for shape, (setup, train_step) in zip(shapes, sharded, strict=True):
        metrics, gradients, state = three_steps(setup, train_step, start)
        for step in range(3):
            np.testing.assert_allclose(
                metrics[step]["loss"], one_metrics[step]["loss"], rtol=1e-6, err_msg=str(shape)
            )
            assert_near(metrics[step], one_metrics[step])
            expected = jax.tree_util.tree_leaves_with_path(one_gradients[step])
            whole = np.sqrt(sum(np.sum(np.square(g)) for _, g in expected))
            for (path, g), ours in zip(expected, jax.tree.leaves(gradients[step]), strict=True):
                # A key bias has a true gradient of zero: its rounding counts against the whole.
                bound = 1e-5 * np.linalg.norm(g) + 1e-7 * whole
                error = np.linalg.norm(ours - g)
                assert error <= bound, (shape, step, rules.path_name(path))
        assert_near(*jax.device_get((state.model_state, one_state.model_state)))
        for tree in (state.params, state.opt_state):  # they really lie in parts
            kernel = tree["text"]["proj"]["kernel"]
            assert kernel.addressable_shards[0].data.size * shape[1] == kernel.size


def test_where_the_state_lies():
    setup = Setup(config("declip", shape=(2, 4)))
    state = setup.abstract_state
    kernel = state.params["text"]["proj"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", None)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) >= 2 and all(x.sharding == kernel.sharding for x in moments)
    support = state.model_state["support_set"]
    assert support["rows"].sharding.spec == PartitionSpec(("data", "fsdp"))
    assert support["pointer"].sharding.is_fully_replicated


def test_a_step_sends_nothing_as_large_as_the_support_set():
    c = config("declip", shape=(2, 4))
    c.loss.support_set.size = 4096
    setup = Setup(c)
    state = setup.abstract_state
    batch = shard_batch(next(batches(setup.method.views)), setup.mesh)
    batch["image"] = batch["image"].astype(jnp.float32)

    def both_ways(
        params, model_state, batch
    ):  # a step without the optimizer, which has no such set
        loss = jax.grad(setup.method.loss, has_aux=True)
        gradients, aux = loss(params, model_state, batch, jax.random.key(0))
        return gradients, aux.model_state

    places = setup.state_shardings.params, setup.state_shardings.model_state
    step = jax.jit(both_ways, out_shardings=places)
    step = step.lower(state.params, state.model_state, batch).compile()
    rows = state.model_state["support_set"]["rows"]
    queries = 2 * BATCH * c.model.embed_dim
    # Not even a device's share of it, of which eight would be the whole.
    assert queries <= largest_collective(step) < rows.size // 8
    # What this sees where the set is sent.
    whole = jax.jit(lambda rows: rows, out_shardings=replicated(setup.mesh)).lower(rows)
    assert largest_collective(whole.compile()) == rows.size


@pytest.mark.parametrize("data, fsdp", [(3, 1), (-1, 3), (-1, -1), (0, 8), (16, 1), (-1, 0)])
def test_mesh_that_does_not_fit_is_refused(data, fsdp):
    with pytest.raises(ValueError, match=f"config.mesh.data={data} .*8 devices"):
        meshes.make_mesh(data, fsdp)


def test_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="config.batch_size=12 cannot be divided over 8 devices"):
        meshes.check_batch_size("config.batch_size", 12, meshes.make_mesh(-1, 1))


def test_match_takes_the_first_rule_and_names_what_is_uncovered():
    tree = {"a": {"kernel": 1, "bias": 2}, "kernels": [3]}
    assert rules.match(tree, [("^a/k", "x"), ("bias|kernel", "y")], "rules") == {
        "a": {"kernel": "x", "bias": "y"},
        "kernels": ["y"],
    }
    with pytest.raises(ValueError, match="No pattern of rules covers: a/bias"):
        rules.match(tree, [("kernel", "x")], "rules")


def test_fsdp_divides_the_longest_dimension_that_it_can():
    mesh = meshes.make_mesh(2, 4)
    tree = {"kernel": jnp.zeros((2, 8, 12)), "embedding": jnp.zeros((3, 5))}
    placed = rules.shardings(tree, mesh)
    assert placed["kernel"].spec == PartitionSpec(None, None, "fsdp")
    assert placed["embedding"].spec == PartitionSpec(None, None)
