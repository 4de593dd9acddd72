"""Whole runs: exact resumption, what a run leaves behind, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from configs import quickstart
from declip_jax import prepare
from declip_jax import train as train_module
from declip_jax.checkpoint import CheckpointError, Checkpoints
from declip_jax.metrics import read_metrics
from declip_jax.train import Setup, train

ROOT = Path(__file__).parent.parent


def tiny(**fields):
    """The quickstart's smoke run (a ResNet, so with BN statistics), without evaluation."""
    config = quickstart.get_config("tiny").unlock()
    config.eval.every = 0
    config.checkpoint.best_metric = ""
    config.update_from_flattened_dict(fields)
    return config.lock()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> str:
    """Twenty small images with two captions each: epochs that end in the middle of a batch."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    rows = ["image,caption"]
    for i in range(20):
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (40, 48, 3), np.uint8))
        rows += [f"{i}.png,picture number {i}", f"{i}.png,the same picture {i} again"]
    (folder / "captions.csv").write_text("\n".join(rows))
    prepare.main(
        ["csv", "--images", str(folder), "--captions", str(folder / "captions.csv"), "--output",
         str(folder / "data"), "--split", "train"]
    )  # fmt: skip
    return str(folder / "data")


# Trains as main does, and presses Ctrl-C after a chosen step (0: never), which as in a terminal
# goes to the data workers too.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
from configs import quickstart
from declip_jax import metrics, train

class Progress(metrics.Progress):
    def show(self, step, scalars):
        super().show(step, scalars)
        if step == int(sys.argv[2]):
            os.killpg(0, signal.SIGINT)

train.Progress = Progress
config = quickstart.get_config("tiny").unlock()
config.update_from_flattened_dict(json.loads(sys.argv[3]))
train.train(config.lock(), Path(sys.argv[1]))
"""

EVERYTHING_RANDOM = {
    "eval.every": 0,
    "checkpoint.best_metric": "",
    "checkpoint.every": 100,
    "ema_decay": 0.9,
    "optim.clip_norm": 1.0,
    "views.weak.flip": 0.5,
    "views.weak.jitter_prob": 0.8,
    "views.weak.grey_prob": 0.2,
    "views.weak.blur_prob": 0.5,
    "views.weak.blur_sigma": (0.1, 0.5),
    "mesh.fsdp": 2,
}


def run_process(workdir: Path, stop_after: int, fields: dict) -> str:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(workdir), str(stop_after), json.dumps(fields)],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_steps_a_new_process_and_two_steps_equal_four_bit_for_bit(tmp_path, photographs):
    fields = EVERYTHING_RANDOM | {"data.source": photographs}
    run_process(tmp_path / "at_once", 0, fields | {"compilation_cache": str(tmp_path / "cache")})
    assert any((tmp_path / "cache").iterdir())
    fields |= {"data.workers": 1}  # must make no difference
    interrupted = run_process(tmp_path / "halves", 2, fields)
    assert "Interrupted at step 2 and saved. The same command continues." in interrupted
    continued = run_process(tmp_path / "halves", 0, fields)
    assert "from step 2 (32 pairs seen)" in continued

    mesh_config = tiny(**{"ema_decay": 0.9, "optim.clip_norm": 1.0})
    setup = Setup(mesh_config)
    ours, expected = (
        Checkpoints(tmp_path / name, read_only=True) for name in ("halves", "at_once")
    )
    assert ours.record(4)["samples"] == expected.record(4)["samples"] == 64
    restored = [c.restore(4, setup.abstract_state) for c in (ours, expected)]
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(restored[0]),
        jax.tree.leaves(restored[1]),
        strict=True,
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    assert jax.tree.leaves(restored[0].extra)  # BN statistics were there to compare

    losses = [
        [row["train/loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("halves", "at_once")
    ]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4

    finished = run_process(tmp_path / "halves", 0, fields)
    assert "is finished: step 4 of 4" in finished


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The workdir of a smoke run with evaluation and a profile."""
    workdir = tmp_path_factory.mktemp("run")
    config = quickstart.get_config("tiny").unlock()
    config.profile.steps = (2, 3)
    config.ema_decay = 0.5
    train(config.lock(), workdir)
    return workdir


def test_a_run_logs_what_it_should(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = "loss clip top1 top5 learning_rate logit_scale grad_norm update_norm pairs_per_s"
    names += " pairs_per_s_per_device data_wait_share seconds_left"
    for row in rows:
        assert {f"train/{name}" for name in names.split()} <= row.keys()
        assert row["train/grad_norm"] > 0
    assert {"val/zeroshot/top1", "val/retrieval/image_to_text_r1"} <= rows[-1].keys()


def test_a_run_leaves_events_a_profile_and_its_config(run):
    assert list(run.glob("events.out.tfevents.*"))
    assert list(run.glob("plugins/profile/*/*.xplane.pb"))
    assert json.loads((run / "config.json").read_text())["total_steps"] == 4


def test_checkpoints_every_two_steps(run):
    assert Checkpoints(run, read_only=True).steps() == [2, 4]


def test_evaluation_uses_the_moving_average(run):
    from declip_jax.evaluate import load

    config, encoder, step = load(run)
    assert step == 4
    state = Checkpoints(run, read_only=True).restore(4, Setup(config).abstract_state)
    averages, params = jax.tree.leaves(state.ema), jax.tree.leaves(state.params)
    used = jax.tree.leaves(encoder._params)
    assert all(np.array_equal(a, b) for a, b in zip(used, averages, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(averages, params, strict=True))


def test_another_architecture_in_the_workdir_names_the_fields(run):
    config = quickstart.get_config("tiny").unlock()
    config.ema_decay = 0.5
    config.total_steps = 8
    config.model.image.width = 16
    config.model.activation = "gelu"
    with pytest.raises(CheckpointError) as error:
        train(config, run)
    assert "model.image.width: 8 -> 16" in str(error.value)
    assert "model.activation: 'quick_gelu' -> 'gelu'" in str(error.value)
    assert Checkpoints(run, read_only=True).steps() == [2, 4]


def test_frozen_parameters_stay_and_others_move(tmp_path):
    config = tiny(**{"optim.frozen": ("^image/conv1/",), "batch_size": 8})
    setup = Setup(config, jax.devices()[:1])
    before = jax.device_get(setup.init_state().params)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 49405, (8, 1, 32)).astype(np.int32)
    batch = {"image": rng.integers(0, 256, (8, 1, 32, 32, 3)).astype(np.uint8), "tokens": tokens}
    state, _ = setup.jit_train_step()(setup.init_state(), batch)
    after = jax.device_get(state.params)
    np.testing.assert_array_equal(
        before["image"]["conv1"]["kernel"], after["image"]["conv1"]["kernel"]
    )
    assert not np.array_equal(before["image"]["conv2"]["kernel"], after["image"]["conv2"]["kernel"])


def test_sigterm_saves_the_step_in_hand(tmp_path, monkeypatch):
    class Terminated(train_module.Progress):
        def show(self, step, scalars):
            super().show(step, scalars)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_module, "Progress", Terminated)
    before = signal.getsignal(signal.SIGTERM)
    state = train(tiny(**{"checkpoint.every": 100}), tmp_path)
    assert int(state.step) == 1 and Checkpoints(tmp_path, read_only=True).steps() == [1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower.*config.optim.peak_lr"):
        train(tiny(**{"optim.peak_lr": 1e30, "optim.warmup_lr": 1e30}), tmp_path)
    assert Checkpoints(tmp_path, read_only=True).steps() in ([], [2])


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"batch_size": 12}, "config.batch_size=12 cannot be divided over 8 devices"),
        ({"eval.batch_size": 3}, "config.eval.batch_size=3"),
        ({"total_steps": 0}, "config.total_steps=0"),
        ({"method": "clop"}, "config.method='clop'"),
        ({"ema_decay": 1.0}, "config.ema_decay=1.0"),
        ({"profile.steps": (5, 2)}, "config.profile.steps=(5, 2)"),
        ({"data.workers": -1}, "config.data.workers=-1"),
        ({"model.text.vocab_size": 100}, "model.text.eot_id"),
        ({"model.text.vocab_size": 49_408}, "config.model.text.vocab_size=49408"),
        ({"model.image.bn_group_size": 3}, "config.model.image.bn_group_size=3"),
        ({"loss.logit_scale_range": (2.0, 1.0)}, "config.loss.logit_scale_range=(2.0, 1.0)"),
        ({"data.source": "nowhere"}, "data source 'nowhere'"),
        ({"data.split": "trian"}, "trian"),
        ({"checkpoint.best_metric": "val/zeroshot/top1"}, "config.checkpoint.best_metric"),
        ({"model.image.kind": "vti"}, "model.image.kind='vti'"),
        ({"model.dtype": "float16"}, "model.dtype='float16'"),
        ({"views.weak.flip": 2.0}, "config.views.weak.flip=2.0"),
        ({"eval.every": 1, "eval.resize": 16}, "config.eval.resize=16"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_settings_are_named_before_anything_is_written(fields, named, tmp_path):
    with pytest.raises(ValueError) as error:
        train(tiny(**fields), tmp_path / "run")
    assert named in str(error.value)
    assert not (tmp_path / "run").exists()


def test_misspelt_loss_weight(tmp_path):
    config = tiny().unlock()
    config.loss.weights = {"clap": 1.0}
    with pytest.raises(ValueError, match=r"\['clap'\], but the method's loss terms are \['clip'\]"):
        train(config, tmp_path / "run")


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="--workdir=.*file/run cannot be written to"):
        train(tiny(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--help"], "Train a model."),
        (["--config=configs/quickstart.py:tiny", "--config.optim.peek_lr=1"], "peek_lr"),
        (["--config=configs/quickstart.py:tiny", "--config.loss.weights.clap=1"], "clap"),
        (["--config=configs/quickstart.py:tyni", "--workdir=x"], "tyni"),
        (["--config=configs/quickstart.py:tiny"], "workdir"),
        (["--config=configs/nowhere.py", "--workdir=x"], "configs/nowhere.py"),
        (
            ["--config=configs/quickstart.py:tiny", "--workdir=x", "--config.mesh.data=7"],
            "mesh.data=7",
        ),
    ],
    ids=["help", "field", "weight", "argument", "workdir", "file", "mesh"],
)
def test_command_line(arguments, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "declip_jax.main", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 or arguments == ["--help"]
    assert "Traceback" not in done.stderr
    assert said in done.stdout + done.stderr
