"""Sharded equals unsharded: eight devices in every mesh shape against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import common
from declip_jax import augment
from declip_jax.parallel import mesh as meshes
from declip_jax.parallel import rules
from declip_jax.parallel.mesh import shard_batch
from declip_jax.train import Setup


def config(kind):
    c = common.get_config("tiny").unlock()
    if kind == "resnet":
        c.model.image = dict(
            kind="resnet", resolution=32, width=8, layers=(1, 1, 1, 1), heads=4, bn_group_size=0
        )
    c.views.weak.update(flip=0.5, jitter_prob=0.8, grey_prob=0.2)
    return c


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 49405, (16, 1, 32)).astype(np.int32)
    tokens[:, :, 10] = 49407
    return {"image": rng.integers(0, 256, (16, 1, 32, 32, 3)).astype(np.uint8), "tokens": tokens}


def loss_and_gradients(kind, devices, data, fsdp, state=None):
    c = config(kind)
    c.mesh.update(data=data, fsdp=fsdp)
    setup = Setup(c, devices)
    # One program makes the state, which then is laid over the mesh.
    state = setup.init_state() if state is None else jax.device_put(state, setup.state_shardings)
    views = [c.views.weak]

    @jax.jit
    def run(state, batch):
        images = augment.augment(state.rng, batch["image"], views, c.image_mean, c.image_std)
        return jax.value_and_grad(setup.method.loss, has_aux=True)(
            state.params, state.extra, {**batch, "image": images}, state.rng
        )

    (loss, aux), grads = run(state, shard_batch(batch(), setup.mesh))
    return jax.device_get((loss, aux.extra, grads)), state


@pytest.fixture(scope="module")
def one_device():
    found = {kind: loss_and_gradients(kind, jax.devices()[:1], 1, 1) for kind in ("vit", "resnet")}
    return {kind: (result, jax.device_get(state)) for kind, (result, state) in found.items()}


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_sharded_equals_one_device(kind, shape, one_device):
    (one_loss, one_extra, one_grads), state = one_device[kind]
    (loss, extra, grads), state = loss_and_gradients(kind, jax.devices(), *shape, state)
    np.testing.assert_allclose(loss, one_loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), extra, one_extra
    )
    whole = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(one_grads)))
    for (path, ours), expected in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(one_grads), strict=True
    ):
        # A key bias has a true gradient of zero: its rounding counts against the whole.
        bound = 1e-5 * np.linalg.norm(expected) + 1e-7 * whole
        assert np.linalg.norm(ours - expected) <= bound, rules.path_name(path)

    if shape[1] > 1:  # parameters and moments really lie in parts
        kernel = state.params["text"]["proj"]["kernel"]
        assert kernel.addressable_shards[0].data.size * shape[1] == kernel.size
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
        assert all(m.addressable_shards[0].data.size * shape[1] == m.size for m in moments)


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
