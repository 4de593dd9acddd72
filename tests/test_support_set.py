"""The sharded support set against a plain queue, on every mesh."""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from declip_jax import support_set
from declip_jax.checkpoint import Checkpoints
from declip_jax.losses import options
from declip_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from declip_jax.state import TrainState
from tests.hlo import largest_collective

pytestmark = pytest.mark.mesh

SIZE, WIDTH = 24, 5
MESHES = [(1, 1), (8, 1), (2, 4)]
on_meshes = pytest.mark.parametrize("shape", MESHES, ids=lambda s: f"{s[0]}x{s[1]}")


def mesh_of(shape):
    return make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])


def shardings(mesh):
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return {"rows": rows, "pointer": replicated(mesh), "filled": replicated(mesh)}


def init(mesh, size=SIZE, width=WIDTH):
    make = partial(support_set.init, size=size, width=width)
    return jax.jit(make, out_shardings=shardings(mesh))(jax.random.PRNGKey(0))


def state_of(rows, mesh, pointer=0, filled=0):
    state = {"rows": rows, "pointer": pointer, "filled": filled}
    return jax.device_put(jax.tree.map(jnp.asarray, state), shardings(mesh))


jit_nearest = jax.jit(support_set.nearest, static_argnames=("k", "mesh", "block"))
jit_enqueue = jax.jit(support_set.enqueue, static_argnames="mesh", donate_argnames="state")


def nearest(state, queries, k, mesh, block=2):
    queries = jax.device_put(queries, batch_sharding(mesh))
    return jax.device_get(jit_nearest(state, queries, k=k, mesh=mesh, block=block))


def unit_rows(rng, rows, width=WIDTH):
    x = rng.normal(size=(rows, width))
    return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))


@on_meshes
def test_equals_a_queue(shape):
    mesh = mesh_of(shape)
    state = init(mesh)
    queue = deque(np.asarray(state["rows"]), maxlen=SIZE)
    enqueued = 0
    rng = np.random.default_rng(0)
    # Of one size and of many; more than the set holds; sizes that neither it nor a device divides.
    for count in rng.permutation([8, 8, 8, 8, 7, 7, 1, SIZE, SIZE + 1, 3 * SIZE + 5]):
        queries = unit_rows(rng, 8)
        found = nearest(state, queries, 3, mesh)
        newest_first = np.stack(queue)[::-1]
        cosines = np.float64(queries) @ np.float64(newest_first).T
        order = np.argsort(-cosines, axis=1)[:, :3]
        np.testing.assert_allclose(found.rows, newest_first[order], rtol=1e-6)
        np.testing.assert_allclose(
            found.similarity, np.take_along_axis(cosines, order, axis=1), atol=1e-6
        )
        np.testing.assert_array_equal(found.age, np.where(order < enqueued, order, -1))

        batch = unit_rows(rng, count)
        state = jit_enqueue(state, batch, mesh=mesh)
        queue.extend(batch)
        enqueued += count
        assert state["pointer"] == enqueued % SIZE
        assert state["filled"] == min(enqueued, SIZE)
        oldest_first = np.roll(state["rows"], -int(state["pointer"]), axis=0)
        np.testing.assert_array_equal(oldest_first, np.stack(queue))
        assert state["rows"].sharding.is_equivalent_to(shardings(mesh)["rows"], 2)


def test_init_does_not_depend_on_the_mesh():
    one, *others = (jax.device_get(init(mesh_of(shape), 64, 512)) for shape in MESHES)
    np.testing.assert_allclose(np.linalg.norm(one["rows"], axis=1), 1, rtol=1e-6)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, one)
    assert one["pointer"] == one["filled"] == 0


@on_meshes
@pytest.mark.parametrize("block", [1, 5, 1000])
def test_of_equal_rows_the_first_wins(shape, block):
    rows = np.zeros((48, 3), np.float32)
    rows[:, 2] = 1
    rows[[45, 7, 30, 6]] = [1, 0, 0]  # on several devices, and twice on one
    queries = np.tile(np.float32([[1, 0, 0], [0, 1, 0]]), (4, 1))
    # With the set full, the age tells which row it was: the newest is row 47.
    state = state_of(rows, mesh_of(shape), pointer=0, filled=48)
    found = nearest(state, queries, 5, mesh_of(shape), block)
    for query in range(0, 8, 2):
        np.testing.assert_array_equal(47 - found.age[query], [6, 7, 30, 45, 0])
        np.testing.assert_array_equal(found.similarity[query], [1, 1, 1, 1, 0])
        np.testing.assert_array_equal(47 - found.age[query + 1], [0, 1, 2, 3, 4])


@on_meshes
def test_all_rows_can_be_asked_for(shape):
    rows = np.concatenate([np.eye(8), -np.eye(8)]).astype(np.float32)
    state = state_of(rows, mesh_of(shape), pointer=0, filled=16)
    found = nearest(state, rows[:8], 16, mesh_of(shape))
    for query in range(8):  # itself first, its opposite last
        expected = [query, *(i for i in range(16) if i % 8 != query), query + 8]
        np.testing.assert_array_equal(15 - found.age[query], expected)
        np.testing.assert_array_equal(found.rows[query], rows[expected])


def test_no_gradient():
    mesh = mesh_of((2, 4))
    state = init(mesh)

    @jax.jit
    def f(queries, rows):
        after = support_set.enqueue({**state, "rows": rows}, queries, mesh=mesh)
        found = support_set.nearest(after, queries, mesh=mesh, block=2)
        return after["rows"].sum() + found.rows.sum() + found.similarity.sum()

    queries = jnp.asarray(unit_rows(np.random.default_rng(0), 16))
    for gradient in jax.grad(f, argnums=(0, 1))(queries, state["rows"]):
        assert not gradient.any()


@pytest.mark.parametrize("shape", MESHES[1:], ids=lambda s: f"{s[0]}x{s[1]}")
def test_nothing_as_large_as_the_set_is_sent(shape):
    mesh = mesh_of(shape)
    state = init(mesh, 4096, 16)
    queries = jax.device_put(np.zeros((64, 16), np.float32), batch_sharding(mesh))

    search = jit_nearest.lower(state, queries, k=3, mesh=mesh, block=128).compile()
    assert largest_collective(search) == queries.size
    enqueue = jit_enqueue.lower(state, queries, mesh=mesh).compile()
    assert largest_collective(enqueue) == queries.size
    # What a search would be without its arrangements, to show that this test sees it.
    whole = jax.jit(lambda rows: rows, out_shardings=replicated(mesh)).lower(state["rows"])
    assert largest_collective(whole.compile()) == state["rows"].size


def test_memory_of_the_published_size():
    """65,536 rows of width 512, 8,192 queries and as many rows enqueued, on eight devices."""
    mesh = mesh_of((2, 4))
    make = partial(support_set.init, size=65_536, width=512)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(make, jax.random.PRNGKey(0)),
        shardings(mesh),
    )
    queries = jax.ShapeDtypeStruct((8192, 512), jnp.float32, sharding=batch_sharding(mesh))
    gathered = 8192 * 512 * 4
    for k in (1, 5):
        search = jit_nearest.lower(state, queries, k=k, mesh=mesh, block=1024).compile()
        assert gathered < search.memory_analysis().temp_size_in_bytes <= 64 * 2**20
    enqueue = jit_enqueue.lower(state, queries, mesh=mesh).compile().memory_analysis()
    assert enqueue.temp_size_in_bytes < 1.1 * gathered
    assert enqueue.alias_size_in_bytes >= 65_536 * 512 * 4 / 8  # the rows are replaced in place


def test_checkpoint_continues_on_another_number_of_devices(tmp_path):
    rng = np.random.default_rng(0)
    eight, two = mesh_of((2, 4)), mesh_of((1, 2))

    def train_state(support, mesh):
        model_state = {"support_set": support}
        rest = jax.device_put((jnp.int32(1), jax.random.PRNGKey(0)), replicated(mesh))
        return TrainState(
            step=rest[0], params={}, opt_state={}, model_state=model_state, ema=None, rng=rest[1]
        )

    def run_on(state, mesh):
        state = jit_enqueue(state, batches[1], mesh=mesh)
        return jax.device_get(state), nearest(state, queries, 2, mesh)

    batches, queries = [unit_rows(rng, 21), unit_rows(rng, 10)], unit_rows(rng, 8)
    state = jit_enqueue(init(eight), batches[0], mesh=eight)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(train_state(state, eight), 0, "x", {}, {})
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        train_state(init(two), two),
    )
    restored = checkpoints.restore(1, like).model_state["support_set"]
    checkpoints.close()
    assert len(restored["rows"].sharding.device_set) == 2
    expected_state, expected = run_on(state, eight)
    found_state, found = run_on(restored, two)
    jax.tree.map(np.testing.assert_array_equal, found_state, expected_state)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.age, expected.age)
    np.testing.assert_allclose(found.similarity, expected.similarity, rtol=1e-6)


def test_metrics():
    found = support_set.Neighbors(
        rows=jnp.zeros((4, 2, 3)),
        similarity=jnp.array([[0.5, 0.1], [0.7, 0.1], [0.9, 0.1], [0.3, 0.1]]),
        age=jnp.array([[0, 0], [3, 0], [4, 0], [-1, 0]]),
    )
    state = {"rows": jnp.zeros((8, 3)), "pointer": jnp.int32(6), "filled": jnp.int32(6)}
    values = support_set.metrics(found, state, young_rows=4)
    assert values.keys() == {"nn_similarity", "nn_replaced", "nn_young"}
    np.testing.assert_allclose(values["nn_similarity"], 0.6)
    np.testing.assert_allclose(values["nn_replaced"], 6 / 8)
    np.testing.assert_allclose(values["nn_young"], 2 / 4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"size": 60}, "size=60 cannot be divided over 8 devices: choose a positive multiple of 8"),
        ({"size": 24}, r"size=24 is smaller than the 32 rows enqueued a step, 2 × config.batch_si"),
        ({"neighbors": 65}, "neighbors=65 must lie in 1 … 64"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    right = dict(size=64, devices=8, enqueued_per_step=32, neighbors=64)
    support_set.check(**right)
    with pytest.raises(ValueError, match=f"config.loss.support_set.{message}"):
        support_set.check(**{**right, **wrong})


@pytest.mark.parametrize("field", ["size", "neighbors", "young_steps"])
def test_numbers_below_one_are_refused_when_the_section_is_read(field):
    with pytest.raises(ValueError, match=f"config.loss.support_set.{field}=0 must be at least 1"):
        options.SupportSet.read(
            dict(size=64, neighbors=1, young_steps=1) | {field: 0}, "config.loss.support_set"
        )
