import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import common
from declip_jax.checkpoint import CheckpointError, Checkpoints, config_differences
from declip_jax.config import Config
from declip_jax.parallel.mesh import make_mesh
from declip_jax.parallel.rules import shardings
from declip_jax.state import TrainState

pytestmark = pytest.mark.mesh

CONFIG = Config.read(common.get_config("tiny")).record()


def state(step=1, width=16, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    params = {
        "logit_scale": jnp.float32(2.5),
        "proj": {"kernel": jnp.asarray(rng.normal(size=(8, width)), dtype)},
    }
    return TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=(jax.tree.map(lambda p: p * 2, params),),
        model_state={"batch_stats": {"bn": {"mean": jnp.arange(4.0)}}},
        ema=None,
        rng=jax.random.PRNGKey(seed),
    )


def abstract(tree, mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh)
    )


def save(tmp_path, *states, **options):
    checkpoints = Checkpoints(tmp_path, **options)
    for s in states:
        checkpoints.save(s, samples=16 * int(s.step), data="x", config=CONFIG, metrics={})
    checkpoints.close()


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_comes_back_bit_for_bit_on_another_mesh(tmp_path, shape):
    save(tmp_path, state(3))
    mesh = make_mesh(*shape)
    restored = Checkpoints(tmp_path, read_only=True).restore(3, abstract(state(), mesh))
    assert_equal(restored, state(3))
    spec = PartitionSpec(None, "fsdp") if shape[1] > 1 else PartitionSpec(None, None)
    assert restored.params["proj"]["kernel"].sharding == NamedSharding(mesh, spec)


def test_record_holds_step_samples_and_the_whole_config(tmp_path):
    save(tmp_path, state(3))
    record = Checkpoints(tmp_path, read_only=True).record(3)
    assert record["step"] == 3 and record["samples"] == 48
    assert config_differences(record["config"], CONFIG) == ([], [])


def test_keeps_the_newest_and_the_best(tmp_path):
    for scores in ([(1, 0.1), (2, 0.7), (3, 0.3)], [(4, None), (5, 0.4), (6, 0.2)]):
        checkpoints = Checkpoints(tmp_path, keep=2, best_metric="val/zeroshot/top1")
        for step, top1 in scores:
            metrics = {} if top1 is None else {"val/zeroshot/top1": top1, "val/other": 1.0}
            checkpoints.save(state(step), samples=0, data="x", config=CONFIG, metrics=metrics)
        checkpoints.close()  # the second round stands for a restarted run
    again = Checkpoints(tmp_path, read_only=True)
    assert again.steps() == [2, 5, 6]
    assert again.latest() == 6
    assert again.best("val/zeroshot/top1") == 2
    assert again.best("val/unheard") is None


def test_flipped_bytes_on_disk_are_found_and_the_leaf_is_named(tmp_path):
    save(tmp_path, state(1))
    mesh = make_mesh(8, 1)
    damaged = state(1)
    damaged.params["proj"]["kernel"] = damaged.params["proj"]["kernel"].at[3, 3].add(1e-6)
    # Arrays of one run beside the record of another: what a flipped byte looks like.
    save(tmp_path / "other", damaged)
    ours, other = (f / "checkpoints" / "1" for f in (tmp_path, tmp_path / "other"))
    (ours / "state").rename(tmp_path / "aside")
    (other / "state").rename(ours / "state")
    with pytest.raises(CheckpointError, match="is damaged: params/proj/kernel changed"):
        Checkpoints(tmp_path, read_only=True).restore(1, abstract(state(), mesh))
    with pytest.raises(CheckpointError, match="is damaged: params/proj/kernel changed"):
        Checkpoints(tmp_path, read_only=True).restore_model(1)


def test_moved_values_change_the_fingerprint(tmp_path):
    from declip_jax.checkpoint import _fingerprint

    before = state()
    swapped = before.replace(
        params={**before.params, "proj": {"kernel": before.params["proj"]["kernel"][::-1]}}
    )
    a, b = _fingerprint(before), _fingerprint(swapped)
    assert [name for name in a if a[name] != b[name]] == ["params/proj/kernel"]


@pytest.mark.parametrize(
    "other, named",
    [
        (state(width=24), r"params/proj/kernel: saved as \(8, 16\) float32, expected \(8, 24\)"),
        (state(dtype=jnp.bfloat16), "params/proj/kernel: saved as .*float32, expected .*bfloat16"),
        (state().replace(model_state={}), "unexpected: extra/batch_stats/bn/mean"),
        (state().replace(ema=state().params), "missing: ema/logit_scale"),
    ],
)
def test_checkpoint_of_another_architecture_names_the_leaves(tmp_path, other, named):
    save(tmp_path, state(1))
    with pytest.raises(CheckpointError, match=named):
        Checkpoints(tmp_path, read_only=True).restore(1, abstract(other, make_mesh(8, 1)))


def test_config_differences_tell_the_model_from_the_rest():
    now = common.get_config("tiny").unlock()
    now.model.image.width = 64
    now.model.scan = False
    now.model.attention, now.model.dtype = "cudnn", "bfloat16"
    now.model.image.patch_dropout = 0.5
    now.model.heads.dense = 128
    now.optim.peak_lr = 5e-4
    model, other = config_differences(CONFIG, Config.read(now).record())
    assert model == ["model.image.width: 32 -> 64"]
    assert other == [
        "model.attention: 'xla' -> 'cudnn'",
        "model.dtype: 'float32' -> 'bfloat16'",
        "model.heads.dense: 16 -> 128",
        "model.image.patch_dropout: 0.0 -> 0.5",
        "model.scan: True -> False",
        "optim.peak_lr: 0.001 -> 0.0005",
    ]
