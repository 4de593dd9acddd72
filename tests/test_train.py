"""Whole runs: exact resumption, what a run leaves behind, and what it refuses."""

import functools
import gzip
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from declip_jax import methods, prepare
from declip_jax import train as train_module
from declip_jax.checkpoint import CheckpointError, Checkpoints
from declip_jax.metrics import read_metrics
from declip_jax.parallel import mesh as meshes
from declip_jax.parallel import rules
from declip_jax.step import Setup
from declip_jax.train import train
from declip_jax.trained import load
from tests import make_runs, toy

ROOT = Path(__file__).parent.parent
CLIP, SLIP, FILIP, DECLIP, DEFILIP, ALIP = (
    f"{method}_vit_b32_yfcc15m" for method in ("clip", "slip", "filip", "declip", "defilip", "alip")
)


def tiny(experiment, fields=()):
    """The smoke run of an experiment, without evaluation."""
    config = importlib.import_module(f"configs.{experiment}").get_config("tiny").unlock()
    config.eval.every = 0
    config.checkpoint.best_metric = ""
    config.update_from_flattened_dict(dict(fields))
    return config.lock()


@pytest.fixture
def toy_config(monkeypatch):
    """`toy.config`, whose method is one of the known ones meanwhile."""
    monkeypatch.setitem(methods.METHODS, "toy", toy.METHOD)
    return toy.config


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Twenty small images: epochs that end in the middle of a batch. Each has two captions, of
    which a few are long. Beside them synonyms."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    rows = ["image,caption"]
    for i in range(20):
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (40, 48, 3), np.uint8))
        again = " and again" * (6 if i < 2 else 1)
        rows += [f"{i}.png,picture number {i}", f"{i}.png,the same picture{again}"]
    (folder / "captions.csv").write_text("\n".join(rows))
    arguments = ["csv", "--images", str(folder), "--captions", str(folder / "captions.csv")]
    prepare.main([*arguments, "--output", str(folder / "data"), "--split", "train"])
    with gzip.open(folder / "synonyms.json.gz", "wt") as file:
        json.dump({"picture": ["image", "painting"], "number": ["figure"]}, file)
    return folder


# Trains as main does, and presses Ctrl-C after a chosen step (0: never), which as in a terminal
# goes to the data workers too.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
from configs import declip_vit_b32_yfcc15m
from declip_jax import metrics, train

class Progress(metrics.Progress):
    def show(self, step, scalars):
        super().show(step, scalars)
        if step == int(sys.argv[2]):
            os.killpg(0, signal.SIGINT)

train.Progress = Progress
config = declip_vit_b32_yfcc15m.get_config("tiny").unlock()
config.update_from_flattened_dict(json.loads(sys.argv[3]))
train.train(config.lock(), Path(sys.argv[1]))
"""

EVERYTHING_RANDOM = {
    "eval.every": 0,
    "checkpoint.best_metric": "",
    "checkpoint.every": 100,
    "ema_decay": 0.9,
    "optim.clip_norm": 1.0,
    "views.strong.flip": 0.5,
    "views.strong.jitter_prob": 0.8,
    "views.strong.grayscale_prob": 0.2,
    "views.strong.blur_prob": 0.5,
    "views.strong.blur_sigma": (0.1, 0.5),
    "data.eda": ("synonym", "swap", "delete"),
    "data.token_lengths": (24,),  # of all batches: one program to compile
    "loss.support_set.size": 40,  # wraps in the second step
}


def run_process(workdir: Path, stop_after: int, fields: dict, devices: int = 1) -> str:
    # A file, not a pipe: a data worker that outlives its crashed parent would keep a pipe open.
    output = workdir.with_suffix(".log")
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    if devices > 1:  # see conftest.py
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with output.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(workdir), str(stop_after), json.dumps(fields)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            timeout=600,
        )
    assert done.returncode == 0, output.read_text()
    return output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_compilation_cache_is_used_where_it_is_safe(tmp_path, devices):
    fields = {"compilation_cache": str(tmp_path / "cache"), "eval.every": 0}
    fields |= {"checkpoint.best_metric": "", "data.token_lengths": (24,)}
    said = run_process(tmp_path / "run", 1, fields, devices)
    assert ("compilation_cache is not used" in said) == (devices > 1)
    assert (tmp_path / "cache").is_dir() == (devices == 1)


def assert_same_state(config, workdir, expected):
    """Both have finished four steps; returns their state."""
    abstract = Setup(config).abstract_state
    checkpoints = [Checkpoints(folder, read_only=True) for folder in (workdir, expected)]
    assert [c.record(4)["samples"] for c in checkpoints] == [64, 64]
    ours, expected = (c.restore(4, abstract) for c in checkpoints)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    return ours


def losses(workdir):
    return [row["train/loss"] for row in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.parametrize(
    "devices", [1, pytest.param(2, marks=(pytest.mark.mesh, pytest.mark.slow))]
)
def test_two_steps_a_new_process_and_two_steps_equal_four_bit_for_bit(
    devices, tmp_path, photographs
):
    fields = EVERYTHING_RANDOM | {
        "mesh.fsdp": devices,
        "data.source": str(photographs / "data"),
        "data.synonyms": str(photographs / "synonyms.json.gz"),
    }
    run_process(tmp_path / "at_once", 0, fields, devices)
    fields |= {"data.workers": 1}  # must make no difference
    interrupted = run_process(tmp_path / "halves", 2, fields, devices)
    assert "Interrupted at step 2 and saved. The same command continues." in interrupted
    continued = run_process(tmp_path / "halves", 0, fields, devices)
    assert "from step 2 (32 pairs seen)" in continued

    config = tiny(DECLIP, fields)
    state = assert_same_state(config, tmp_path / "halves", tmp_path / "at_once")
    assert state.model_state.keys() == {"batch_stats", "support_set"}
    assert state.model_state["support_set"]["pointer"] == 4 * 32 % 40
    assert losses(tmp_path / "halves") == losses(tmp_path / "at_once")
    assert len(set(losses(tmp_path / "halves"))) == 4


def test_a_run_that_is_finished_says_so_and_how_to_go_on(toy_config, tmp_path, capsys):
    for total_steps, said in (
        (2, "Finished step 2"),
        (2, "is finished: step 2 of 2. To train on, set config.total_steps higher"),
        (3, "from step 2 (32 pairs seen)"),
    ):
        state = train(toy_config(total_steps=total_steps), tmp_path)
        assert int(state.step) == total_steps
        assert said in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("fsdp", [1, pytest.param(4, marks=pytest.mark.mesh)])
def test_running_means_continue_bit_for_bit(fsdp, toy_config, tmp_path):
    views = {name: EVERYTHING_RANDOM[f"views.strong.{name}"] for name in ("flip", "jitter_prob")}
    fields = {f"views.weak.{name}": value for name, value in views.items()}
    config = toy_config(**fields, **{"mesh.fsdp": fsdp, "ema_decay": 0.9})
    whole, half = tmp_path / "whole", tmp_path / "half"
    train(config, whole)
    shutil.copytree(whole / "checkpoints" / "2", half / "checkpoints" / "2")
    train(config, half)
    state = assert_same_state(config, half, whole)
    assert state.model_state["running_means"]["loss"] != 1
    assert losses(half) == losses(whole)[2:]


@pytest.fixture(scope="module")
def run(declip_run) -> Path:
    return declip_run / "run"


def test_a_run_logs_what_it_should(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = "loss clip simsiam mlm nn_text top1 top5 mlm_dropped nn_similarity nn_young"
    names += " learning_rate logit_scale grad_norm update_norm"
    names += " pairs_per_s pairs_per_s_per_device data_wait_share seconds_left"
    for row in rows:
        assert {f"train/{name}" for name in names.split()} <= row.keys()
        assert {"data/pairs_per_s", "data/image_bytes", "data/bad_share"} <= row.keys()
        assert row["train/grad_norm"] > 0
    # Of 64 rows a step replaces 32; each sees the set as it was before.
    assert [row["train/nn_replaced"] for row in rows] == [0, 0.5, 1, 1]
    assert {"val/zeroshot/top1", "val/retrieval/image_to_text_r1"} <= rows[-1].keys()


def test_a_run_leaves_events_and_its_config(run):
    assert list(run.glob("events.out.tfevents.*"))
    assert json.loads((run / "config.json").read_text())["total_steps"] == 4


@pytest.mark.mesh  # without the cache of programs: see train
def test_a_profile_of_chosen_steps(toy_config, tmp_path):
    train(toy_config(**{"profile.steps": (2, 3)}), tmp_path)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_checkpoints_every_two_steps(run):
    assert Checkpoints(run, read_only=True).steps() == [2, 4]


def test_evaluation_uses_the_moving_average(run):
    trained = load(run)
    assert trained.step == 4
    abstract = Setup(trained.config).abstract_state
    state = Checkpoints(run, read_only=True).restore(4, abstract)
    averages, params = jax.tree.leaves(state.ema), jax.tree.leaves(state.params)
    used = jax.tree.leaves(trained.encoder._params)
    assert all(np.array_equal(a, b) for a, b in zip(used, averages, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(averages, params, strict=True))


def test_another_architecture_in_the_workdir_names_the_fields(declip_run, tmp_path):
    run = shutil.copytree(declip_run / "run", tmp_path / "run")
    config = make_runs.declip_config(declip_run).unlock()
    config.total_steps = 8
    config.model.image.width = 64
    config.model.activation = "gelu"
    with pytest.raises(CheckpointError) as error:
        train(config, run)
    assert "model.image.width: 32 -> 64" in str(error.value)
    assert "model.activation: 'quick_gelu' -> 'gelu'" in str(error.value)
    assert Checkpoints(run, read_only=True).steps() == [2, 4]


def test_frozen_parameters_stay_and_others_move(toy_config):
    setup = Setup(toy_config(**{"optim.frozen": ("^image/",), "batch_size": 8}), jax.devices()[:1])
    before = jax.device_get(setup.init_state())
    moments = [rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(before)]
    assert not any("opt_state" in name and "image" in name for name in moments)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 49405, (8, 1, 32)).astype(np.int32)
    batch = {"image": rng.integers(0, 256, (8, 1, 32, 32, 3)).astype(np.uint8), "tokens": tokens}
    state, _ = setup.jit_train_step()(setup.init_state(), batch)
    before, after = before.params, jax.device_get(state.params)
    np.testing.assert_array_equal(before["image"]["kernel"], after["image"]["kernel"])
    assert not np.array_equal(before["text"]["kernel"], after["text"]["kernel"])


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_every_optimizer_takes_a_step(name, toy_config, tmp_path):
    state = train(toy_config(total_steps=2, **{"optim.name": name}), tmp_path)
    assert int(state.step) == 2
    assert all(row["train/update_norm"] > 0 for row in read_metrics(tmp_path / "metrics.jsonl"))


def test_batches_of_several_lengths(toy_config, tmp_path, photographs, monkeypatch, capsys):
    lengths, compilations = [], []

    def shard_batch(batch, mesh):
        lengths.append(batch["tokens"].shape[-1])
        return meshes.shard_batch(batch, mesh)

    class Meter(train_module.Meter):
        def discount(self, seconds):
            compilations.append(seconds)
            super().discount(seconds)

    monkeypatch.setattr(train_module, "shard_batch", shard_batch)
    monkeypatch.setattr(train_module, "Meter", Meter)
    fields = {"data.source": str(photographs / "data"), "data.token_lengths": (16, 24)}
    train(toy_config(**fields), tmp_path)
    assert len(lengths) == 4 and set(lengths) == {16, 24}
    assert len(compilations) == 2
    said = capsys.readouterr().out
    assert said.count("Compiling the training step …\n") == 1
    later = {length for length in lengths if length != lengths[0]}
    assert f"Compiling the training step for captions of {later.pop()} tokens …" in said
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 4 and all(row["train/pairs_per_s"] > 0 for row in rows)


def test_sigterm_saves_the_step_in_hand(toy_config, tmp_path, monkeypatch):
    class Terminated(train_module.Progress):
        def show(self, step, scalars):
            super().show(step, scalars)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_module, "Progress", Terminated)
    before = signal.getsignal(signal.SIGTERM)
    state = train(toy_config(**{"checkpoint.every": 100}), tmp_path)
    assert int(state.step) == 1 and Checkpoints(tmp_path, read_only=True).steps() == [1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_an_interrupted_evaluation_has_scored_is_kept(toy_config, tmp_path, monkeypatch):
    original = train_module.suite.run

    def run(tasks, encoder, stop):
        found = original(tasks[:1], encoder, stop)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(train_module.suite, "run", run)
    state = train(toy_config(**{"eval.every": 1, "checkpoint.every": 100}), tmp_path)
    assert int(state.step) == 1 and Checkpoints(tmp_path, read_only=True).steps() == [1]
    written = json.loads((tmp_path / "evaluations" / "step_1.json").read_text())
    assert [result["task"] for result in written["results"]] == ["zeroshot"]


def write_tar(path: Path, damaged: Sequence[int]) -> str:
    """Twenty images with captions, a webdataset; of some the image is cut off."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(20):
            image = cv2.imencode(".png", rng.integers(0, 256, (40, 48, 3), np.uint8))[1].tobytes()
            files = {"png": image[:900] if i in damaged else image, "txt": b"a picture"}
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{i:03}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_bad_records_are_counted_and_do_not_stop_the_run(toy_config, tmp_path, capsys):
    fields = {"data.source": write_tar(tmp_path / "a.tar", damaged=(3, 4)), "total_steps": 2}
    train(toy_config(**fields), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(row.get("data/bad/unreadable_image", 0) for row in rows) >= 2
    said = capsys.readouterr().out
    assert re.search(r"Cannot use .*a\.tar: 003: .*Another replaces it", said)


def test_too_many_bad_records_stop_the_run_with_a_checkpoint(toy_config, tmp_path):
    fields = {"data.source": write_tar(tmp_path / "a.tar", damaged=(3, 4, 5)), "total_steps": 50}
    fields |= {"data.bad_window": 100, "data.max_bad_fraction": 0.05, "checkpoint.every": 100}
    with pytest.raises(ValueError, match="config.data.max_bad_fraction=0.05.*a.tar: 00[345]"):
        train(toy_config(**fields), tmp_path / "run")
    (step,) = Checkpoints(tmp_path / "run", read_only=True).steps()
    assert 1 <= step < 8


def test_data_that_changed_are_told_of(toy_config, tmp_path, capsys):
    fields = {"data.source": "scenes", "data.split": "train[:100]", "total_steps": 2}
    train(toy_config(**fields), tmp_path / "run")
    assert "The data have changed" not in capsys.readouterr().out
    fields |= {"data.split": "train[:90]", "total_steps": 3}  # its number, or which they are
    train(toy_config(**fields), tmp_path / "run")
    assert "The data have changed (now 90 records)" in capsys.readouterr().out


def test_loss_that_is_no_number_stops_the_run(toy_config, tmp_path):
    with pytest.raises(FloatingPointError, match="lower.*config.optim.peak_lr"):
        train(toy_config(**{"optim.peak_lr": 1e30, "optim.warmup_lr": 1e30}), tmp_path)
    assert Checkpoints(tmp_path, read_only=True).steps() in ([], [2])


@pytest.mark.mesh
@pytest.mark.parametrize(
    "experiment, fields, named",
    [
        (CLIP, {"batch_size": 12}, "config.batch_size=12 cannot be divided over 8 devices"),
        (CLIP, {"eval.batch_size": 3}, "config.eval.batch_size=3"),
        (CLIP, {"microbatches": 3}, "config.microbatches=3 does not cut config.batch_size=16"),
        (CLIP, {"microbatches": 4}, "config.microbatches=4 does not cut config.batch_size=16"),
        (CLIP, {"total_steps": 0}, "config.total_steps=0"),
        (CLIP, {"method": "clop"}, "config.method='clop'"),
        (CLIP, {"ema_decay": 1.0}, "config.ema_decay=1.0"),
        (CLIP, {"profile.steps": (5, 2)}, "config.profile.steps=(5, 2)"),
        (CLIP, {"checkpoint.best_metric": "val/zeroshot/top1"}, "config.checkpoint.best_metric"),
        (CLIP, {"eval.every": 1, "eval.preprocess": "openai"}, "choose 'train'"),
        (CLIP, {"model.image.kind": "vti"}, "model.image.kind='vti'"),
        (CLIP, {"model.embed_dim": 0}, "model.embed_dim=0"),
        (
            CLIP,
            {"model.image.width": 2**63},
            "config.model.image.width=9223372036854775808 must be",
        ),
        (CLIP, {"seed": 2**32}, "config.seed=4294967296 must lie in 0 … 4294967295"),
        (CLIP, {"model.dtype": "float16"}, "model.dtype='float16'"),
        (CLIP, {"model.attention": "cudnn"}, "config.model.attention='cudnn' must be 'xla'"),
        (CLIP, {"model.text.vocab_size": 100}, "model.text.eot_id"),
        (DECLIP, {"model.text.vocab_size": 49_408}, "config.model.text.vocab_size=49408"),
        (DECLIP, {"model.heads.projector": 0}, "model.heads.projector=0"),
        ("quickstart", {"model.image.bn_group_size": 3}, "config.model.image.bn_group_size=3"),
        (CLIP, {"loss.logit_scale_range": (2.0, 1.0)}, "config.loss.logit_scale_range=(2.0, 1.0)"),
        (CLIP, {"loss.logit_scale_range": (3.0, math.inf)}, "upper limit must be below 88.7"),
        (CLIP, {"loss.block": 0}, "config.loss.block=0"),
        (CLIP, {"loss.max_scale": -5.0}, "config.loss.max_scale=-5.0"),
        (CLIP, {"loss.weights.clip": 0.0}, "config.loss.weights={'clip': 0.0}"),
        (DECLIP, {"loss.weights.mlm": -1.0}, "'mlm': -1.0"),
        (DECLIP, {"loss.weights.mlm": math.nan}, "config.loss.weights.mlm=nan is not a number"),
        (SLIP, {"loss.temperature": 0.0}, "config.loss.temperature=0.0"),
        (FILIP, {"loss.late_interaction.tokens": -1}, "config.loss.late_interaction.tokens=-1"),
        (DEFILIP, {"loss.late_interaction.tokens": -1}, "config.loss.late_interaction.tokens=-1"),
        (DECLIP, {"loss.support_set.size": 24}, "config.loss.support_set.size=24 is smaller than"),
        (DECLIP, {"loss.support_set.size": 36}, "config.loss.support_set.size=36 cannot be divid"),
        (DECLIP, {"loss.weights.nn": 1.0}, "the method's loss terms are ['clip', 'mlm', 'nn_text'"),
        (ALIP, {"loss.adaptive.momentum": 1.0}, "config.loss.adaptive.momentum=1.0"),
        (ALIP, {"loss.adaptive.gamma": -2.0}, "config.loss.adaptive.gamma=-2.0"),
        (CLIP, {"views.weak.flip": 2.0}, "config.views.weak.flip=2.0"),
        (DECLIP, {"views.strong.flip": 2.0}, "config.views.strong.flip=2.0"),
        (CLIP, {"data.source": "nowhere"}, "data source 'nowhere'"),
        (CLIP, {"data.split": "trian"}, "trian"),
        (CLIP, {"data.workers": -1}, "config.data.workers=-1"),
        (CLIP, {"data.prefetch": 1}, "config.data.prefetch=1"),
        (CLIP, {"data.token_lengths": (15,)}, "config.data.token_lengths=(15,)"),
        (DECLIP, {"data.mask_rate": 1.5}, "config.data.mask_rate=1.5"),
        (DECLIP, {"data.eda": ("shuffle",)}, "config.data.eda=('shuffle',)"),
        (
            DECLIP,
            {"data.eda": ("synonym",), "data.synonyms": "nowhere"},
            "config.data.synonyms='nowhere' cannot be read",
        ),
        (CLIP, {"optim.name": "adam"}, "config.optim.name='adam'"),
        (CLIP, {"optim.schedule": "cosign"}, "config.optim.schedule='cosign'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_settings_are_named_before_anything_is_written(experiment, fields, named, tmp_path):
    with pytest.raises(ValueError) as error:
        train(tiny(experiment, fields), tmp_path / "run")
    assert named in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("experiment", [DECLIP, SLIP, "clip_rn50_yfcc15m"])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_one_example_is_too_few_for_batch_normalization(
    experiment, microbatches, tmp_path, monkeypatch
):
    one_device = functools.partial(Setup, devices=jax.devices()[:1])
    monkeypatch.setattr(train_module, "Setup", one_device)
    fields = {"batch_size": microbatches, "microbatches": microbatches}
    with pytest.raises(ValueError, match=f"config.batch_size={microbatches} .* one example"):
        train(tiny(experiment, fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_without_synthetic_captions(photographs, tmp_path):
    with pytest.raises(ValueError, match="data.* has no synthetic captions.*--synthetic-column"):
        train(tiny(ALIP, {"data.source": str(photographs / "data")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_misspelled_loss_weight(tmp_path):
    config = tiny(CLIP).unlock()
    config.loss.weights = {"clap": 1.0}
    with pytest.raises(ValueError, match=r"\['clap'\], but the method's loss terms are \['clip'\]"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_written(toy_config, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="--workdir=.*file/run cannot be written to"):
        train(toy_config(), tmp_path / "file" / "run")
    assert "Initializing" not in capsys.readouterr().out  # nothing was compiled for it


QUICK = ["--config=configs/quickstart.py:tiny", "--workdir=x"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--help"], "Train a model."),
        ([*QUICK, "--config.optim.peek_lr=1"], 'Did you mean "peak_lr" instead of "peek_lr"?'),
        ([*QUICK, "--config.loss.weights.clap=1"], "clap"),
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
    # What is well written is told before JAX, which takes long to start, finds what is wrong.
    first = "Training configs/quickstart.py:tiny in x: starting JAX …\n"
    assert done.stdout.startswith(first) == (said == "mesh.data=7")
