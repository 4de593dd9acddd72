"""The ring against plain logits, and what it is for: its memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.losses import contrastive, ring
from declip_jax.parallel.mesh import batch_sharding, make_mesh, replicated

pytestmark = pytest.mark.mesh

ROWS, WIDTH = 96, 16  # 12 rows a device on 8 devices
MESHES = [(1, 1), (8, 1), (2, 4)]
on_meshes = pytest.mark.parametrize("shape", MESHES, ids=lambda s: f"{s[0]}x{s[1]}")


def mesh_of(shape):
    return make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])


def unit(features):
    return np.float32(features / np.linalg.norm(features, axis=1, keepdims=True))


RNG = np.random.default_rng(0)
X, Y = (unit(RNG.normal(size=(ROWS, WIDTH))) for _ in range(2))
COTANGENTS = np.float32(RNG.normal(size=(2, ROWS)))
EVEN = np.full((2, ROWS), 1 / ROWS, np.float32)
NAMES = ("x_to_y", "y_to_x", "dx", "dy", "dscale")


def values_and_gradients(info_nce, x, y, scale, cotangents):
    def weighted(x, y, scale):
        losses = info_nce(x, y, scale)
        return sum((c * loss).sum() for c, loss in zip(cotangents, losses, strict=True)), losses

    gradients, losses = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(x, y, scale)
    return jax.device_get((*losses, *gradients))


def plain_in_float64(x, y, scale, cotangents, excluded=0):
    with jax.enable_x64(True):
        info_nce = partial(contrastive.info_nce, excluded=excluded)
        arguments = (jnp.asarray(a, jnp.float64) for a in (x, y, scale))
        return values_and_gradients(info_nce, *arguments, cotangents)


def on_ring(shape, block, x, y, scale, cotangents, excluded=0):
    mesh = mesh_of(shape)
    x, y = jax.device_put((x, y), batch_sharding(mesh))
    info_nce = partial(ring.info_nce, excluded=excluded, mesh=mesh, block=block)
    return values_and_gradients(info_nce, x, y, jnp.float32(scale), cotangents)


def assert_equal(ours, plain):
    for name, our, expected in zip(NAMES, ours, plain, strict=True):
        assert our.dtype == np.float32
        # Rounding of gradients is relative to the largest of them: they are sums of many signs.
        np.testing.assert_allclose(
            our, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max(), err_msg=name
        )


@on_meshes
@pytest.mark.parametrize(
    "scale, excluded, block",
    [(14.3, 0, 5), (100.0, 0, 1024), (100.0, ROWS // 2, 5), (14.3, 7, 1)],
)
def test_equals_plain_logits(shape, scale, excluded, block):
    ours = on_ring(shape, block, X, Y, scale, EVEN, excluded)
    assert_equal(ours, plain_in_float64(X, Y, scale, EVEN, excluded))


@on_meshes
def test_gradients_of_weighted_sums(shape):
    ours = on_ring(shape, 4, X, Y, 14.3, COTANGENTS)
    assert_equal(ours, plain_in_float64(X, Y, 14.3, COTANGENTS))


@pytest.mark.parametrize("direction", [0, 1])
def test_gradient_of_one_direction_alone(direction):
    mesh = mesh_of((2, 4))
    arguments = (*jax.device_put((X, Y), batch_sharding(mesh)), 14.3)

    def loss(x, y, scale, info_nce):
        return info_nce(x, y, scale)[direction].mean()

    ours, expected = (
        jax.jit(jax.grad(partial(loss, info_nce=info_nce), (0, 1, 2)))(*arguments)
        for info_nce in (partial(ring.info_nce, mesh=mesh, block=4), contrastive.info_nce)
    )
    for our, gradient in zip(ours, expected, strict=True):
        np.testing.assert_allclose(our, gradient, rtol=1e-5, atol=1e-6)


@on_meshes
def test_pairs_well_told_apart(shape):
    """Logits near 100, losses near 0: rounding of the logits must not show up as a loss."""
    y = unit(X + 0.1 * Y)
    x_to_y, y_to_x, dx, dy, dscale = on_ring(shape, 4, X, y, 100.0, EVEN)
    assert 0 <= x_to_y.min() and 0 <= y_to_x.min()
    expected = plain_in_float64(X, y, 100.0, EVEN)
    np.testing.assert_allclose((x_to_y, y_to_x), expected[:2], atol=1e-7)
    for our, gradient in zip((dx, dy, dscale), expected[2:], strict=True):
        np.testing.assert_allclose(our, gradient, atol=1e-7)


def test_not_a_number_is_not_hidden():
    x = np.where(np.arange(ROWS)[:, None] == 3, np.nan, X)
    x_to_y, y_to_x, *_ = on_ring((8, 1), 4, x, Y, 14.3, EVEN)
    assert np.isnan(x_to_y[3]) and np.isnan(y_to_x).all() and np.isfinite(x_to_y[4:]).all()


@on_meshes
@pytest.mark.parametrize("block", [5, 1024])
def test_positive_rank_equals_plain(shape, block):
    mesh = mesh_of(shape)
    near = unit(X + 1.5 * Y)
    twice = np.concatenate([Y[: ROWS // 2]] * 2)
    same = unit(np.ones((ROWS, WIDTH)))
    broken = np.where(np.arange(ROWS)[:, None] % 5 == 0, np.nan, near)
    positive_rank = jax.jit(partial(ring.positive_rank, mesh=mesh, block=block))
    for queries, keys in [(X, near), (twice, twice), (same, same), (X, broken), (broken, X)]:
        ours = positive_rank(*jax.device_put((queries, keys), batch_sharding(mesh)))
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(ours, contrastive.positive_rank(queries, keys))


def test_rows_must_divide_over_devices():
    x, layout = X[:90], {"mesh": mesh_of((8, 1)), "block": 4}
    for call in (partial(ring.info_nce, x, x, 1.0), partial(ring.positive_rank, x, x)):
        with pytest.raises(ValueError, match="90 rows cannot be divided over 8 devices"):
            call(**layout)


def test_memory_and_communication():
    """At a published batch, as compiled: nothing is executed."""
    mesh = mesh_of((2, 4))
    features = jax.ShapeDtypeStruct((32_768, 512), jnp.float32, sharding=batch_sharding(mesh))
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))

    def loss(x, y, scale):
        x_to_y, y_to_x = ring.info_nce(x, y, scale, mesh=mesh, block=1024)
        return (x_to_y + y_to_x).mean()

    def rank(x, y, _):
        return ring.positive_rank(x, y, mesh=mesh, block=1024)

    for function in (jax.value_and_grad(loss, (0, 1, 2)), rank):
        compiled = jax.jit(function).lower(features, features, scale).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 130 * 2**20  # logits: 4 GiB
        assert "collective-permute" in compiled.as_text()
        assert "all-gather" not in compiled.as_text()
