"""The commands that take a model out of this program and into it."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import clip_rn50_yfcc15m, clip_vit_b32_yfcc15m, declip_vit_b32_yfcc15m
from declip_jax import evaluate, export, exporting, init_from, trained
from declip_jax.checkpoint import Checkpoints
from declip_jax.interop import pretrained, reading, verify
from declip_jax.report import cli as report
from declip_jax.report.runs import load_runs
from declip_jax.step import Setup
from declip_jax.train import train
from tests.make_runs import make_run


def tiny(experiment, **changes):
    config = experiment.get_config("tiny").unlock()
    config.total_steps = config.optim.warmup_steps = 1
    config.eval.every = 0
    config.update_from_flattened_dict(changes)
    return config.lock()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """DeCLIP with a moving average, at two steps."""
    config = tiny(declip_vit_b32_yfcc15m, ema_decay=0.5)
    return make_run(tmp_path_factory.mktemp("declip") / "run", config, steps=(1, 2))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run in DeCLIP's format, with all of its layers."""
    folder = tmp_path_factory.mktemp("exported") / "declip"
    model = trained.read_run(run).model
    exporting.export(model, "declip", folder, {})
    return folder


def command(module, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [None, "--ema", "--no-ema"])
def test_the_moving_average_is_written_unless_it_is_not_wanted(
    ema, run, tmp_path, capsys, monkeypatch
):
    flags = [ema] if ema else []
    arguments = ["--workdir", run, "--format", "declip", "--output", tmp_path / "out", *flags]
    command(export, *arguments, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "declip_jax.json, model.safetensors" in printed and "ViT/8, 2 layers, 32 px" in printed
    read = trained.read(tmp_path / "out").variables
    plain, averaged = (trained.read_run(run, ema=x).model.variables for x in (False, True))
    assert_same(read, plain if ema == "--no-ema" else averaged)
    with pytest.raises(AssertionError):
        assert_same(plain, averaged)
    notes = json.loads((tmp_path / "out" / "declip_jax.json").read_text())
    assert notes["ema"] == (ema != "--no-ema") and notes["step"] == 2 and notes["samples"] == 32
    assert notes["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    assert notes["preprocess"]["short_side"] == round(32 * 256 / 224)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_mode_that_files_get_here(umask, mode, run, tmp_path, monkeypatch):
    before = os.umask(umask)
    try:
        arguments = ["--workdir", run, "--format", "open_clip", "--output", tmp_path / "out"]
        command(export, *arguments, monkeypatch=monkeypatch)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert "open_clip_model.safetensors" in modes and set(modes.values()) == {mode}


def test_a_step_is_chosen(run, tmp_path, monkeypatch):
    for step in (1, 2):
        arguments = ["--workdir", run, "--format", "open_clip", "--step", step]
        arguments += ["--output", tmp_path / str(step)]
        command(export, *arguments, monkeypatch=monkeypatch)
        assert json.loads((tmp_path / str(step) / "declip_jax.json").read_text())["step"] == step
    one, two = (reading.read(tmp_path / name).arrays for name in ("1", "2"))
    assert one.keys() == two.keys()
    assert not np.array_equal(one["positional_embedding"], two["positional_embedding"])


def test_the_command_says_what_is_wrong(run, tmp_path, capsys, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(SystemExit) as end:
            command(export, *arguments, monkeypatch=monkeypatch)
        said = capsys.readouterr().err if end.value.code == 2 else str(end.value.code)
        assert message in said

    to = ["--format", "open_clip", "--output", tmp_path / "out"]
    refused("--output, and --workdir or --init, are needed", "--format", "openai")
    refused("--step and --ema are for --workdir", "--init", exported, *to, "--step", "3")
    refused("--init-format is for --init", "--workdir", run, *to, "--init-format", "alip")
    refused("holds no checkpoints", "--workdir", tmp_path, *to)
    refused("expected one of [1, 2]", "--workdir", run, *to, "--step", "7")
    refused("'best' if the run had", "--workdir", run, *to, "--step", "best")
    openai = ["--format", "openai", "--output", tmp_path / "out"]
    refused("model.image.heads=2", "--workdir", run, *openai)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused("out is not empty: nothing was written", "--workdir", run, *to)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    refused("does not exist", "--init", tmp_path / "absent", "--format", "declip", *to[2:])


def test_a_run_without_moving_average_has_none_to_write(tmp_path):
    folder = make_run(tmp_path / "run", tiny(clip_rn50_yfcc15m))
    with pytest.raises(ValueError, match="no moving average: config.ema_decay was 0"):
        trained.read_run(folder, ema=True)
    model = trained.read_run(folder).model
    assert "batch_stats" in model.variables and model.model["image"]["layers"] == (1, 1, 1, 1)
    assert_same(
        trained.load(folder).encoder._model_state["batch_stats"], model.variables["batch_stats"]
    )
    exporting.export(model, "open_clip", tmp_path / "out", {})
    assert_same(trained.read(tmp_path / "out").variables, model.variables)


def test_lists(run, capsys, monkeypatch):
    command(export, "--format", "open_clip", "--list", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    row = ["params/image/patch_embed/kernel", "visual.conv1.weight", "(OIHW <-> HWIO)"]
    assert row in [line.split(maxsplit=2) for line in lines]
    for name in ("text_projection.bias", "visual.layer{stage}.{block}.conv{n}.weight"):
        assert any(line.split()[1] == name for line in lines)
    command(export, "--format", "declip", "--list", monkeypatch=monkeypatch)
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    for name in ("encode_text.ln_final.bias", "text_encoder.ln_final.bias", "visual.proj"):
        assert names.count(name) == 1  # SLIP's text tower has another name
    arguments = ["--format", "huggingface", "--list", "--workdir", run]
    command(export, *arguments, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    names = "text_model.encoder.layers.1.self_attn.q_proj.bias + "
    (row,) = (line for line in lines if line.startswith("params/text/blocks/attn/in_proj/bias[1]"))
    assert names in row
    assert len(lines) == len({line.split()[0] for line in lines}) and "{i}" not in "".join(lines)


def test_verification_compares_and_fails(run, tmp_path, capsys, monkeypatch):
    arguments = ["--workdir", run, "--format", "open_clip", "--verify", "--output"]

    def absent(*_):
        raise verify.NotInstalled("open_clip_torch cannot be imported")

    monkeypatch.setattr(verify, "theirs", absent)
    command(export, *arguments, tmp_path / "one", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "Read again: the same arrays" in printed
    assert "Not compared: open_clip_torch cannot be imported" in printed

    # A library that computes what the run does, or something else.
    original = trained.read_run(run).model
    off = 0.0

    def same(folder, format, pixels, tokens):
        features = verify.ours(original, pixels, tokens)
        return features._replace(text=features.text + off)

    monkeypatch.setattr(verify, "theirs", same)
    monkeypatch.setattr(verify, "version", lambda format: "a library 1.0")
    command(export, *arguments, tmp_path / "two", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "Largest difference to a library 1.0" in printed and "scenes test" in printed
    off = 1e-3
    with pytest.raises(SystemExit, match="does not compute what the model does"):
        command(export, *arguments, tmp_path / "three", monkeypatch=monkeypatch)
    assert "1.0e-03" in capsys.readouterr().out


# --- to start from --------------------------------------------------------------------------------


def init_state(like):
    """Makes a state of zeros: what draws one takes half a minute to compile."""
    return lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like)


def start(config, devices=None):
    """The first state and what was said."""
    lines, setup = [], Setup(config, devices or jax.devices()[:1])
    setup.init_state = init_state(setup.abstract_state)
    state = init_from.start(setup, lines.append)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, setup.abstract_state
    )
    return state, lines


@pytest.mark.mesh
@pytest.mark.parametrize("source", ["run", "folder", "file"])
def test_a_run_starts_from_another_run_or_a_file_on_any_mesh(source, run, exported):
    path = {"run": run, "folder": exported, "file": exported / "model.safetensors"}[source]
    changes = {"mesh.data": 2, "mesh.fsdp": 4, "ema_decay": 0.5, "init_from": str(path)}
    state, lines = start(tiny(declip_vit_b32_yfcc15m, **changes), jax.devices())
    variables = trained.read_run(run).model.variables
    assert_same(state.params, variables["params"])
    assert_same(state.ema, variables["params"])
    assert_same(state.model_state["batch_stats"], variables["batch_stats"])
    assert "fsdp" in state.params["text"]["token_embedding"]["embedding"].sharding.spec
    assert int(state.step) == 0 and not np.any(state.model_state["support_set"]["rows"])
    assert "Starts from" in lines[0] and str(path) in lines[0]


@pytest.mark.mesh
def test_rows_of_tokens_that_are_missing_stay_as_they_are(exported, tmp_path):
    arrays = reading.read(exported).arrays
    # DeCLIP's order has the mask before the others, OpenAI's has none.
    exporting.export(trained.read(exported), "open_clip", tmp_path / "out", {})
    file = tmp_path / "out" / "open_clip_model.safetensors"
    arrays = dict(reading.read(file).arrays)
    arrays["token_embedding.weight"] = arrays["token_embedding.weight"][:-1]
    safetensors.numpy.save_file(arrays, tmp_path / "cut.safetensors")
    changes = {"mesh.data": 2, "mesh.fsdp": 4, "init_from": str(tmp_path / "cut.safetensors")}
    state, lines = start(tiny(declip_vit_b32_yfcc15m, **changes), jax.devices())
    table = np.asarray(state.params["text"]["token_embedding"]["embedding"])
    np.testing.assert_array_equal(table[:-1], arrays["token_embedding.weight"])
    assert not table[-1].any() and not np.any(state.params["projector"]["linear1"]["kernel"])
    assert any("tokens 49408 … 49408 are not in it" in line for line in lines)


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from configs import declip_vit_b32_yfcc15m
from declip_jax import init_from, trained
from declip_jax.step import Setup
config = declip_vit_b32_yfcc15m.get_config("tiny").unlock()
config.mesh = dict(data=1, fsdp=4)
config.init_from = sys.argv[3]
setup = Setup(config.lock(), jax.devices())
state = init_from.start(setup, lambda line: None)
file = trained.read(config.init_from).variables["params"]["text"]["token_embedding"]["embedding"]
for shard in state.params["text"]["token_embedding"]["embedding"].addressable_shards:
    rows = np.asarray(shard.data)
    np.testing.assert_array_equal(rows[: len(file)], file[(slice(None), *shard.index[1:])])
    assert len(rows) == len(file) + 1 and rows[-1].any()
assert state.params["projector"]["linear1"]["kernel"].sharding.mesh.size == 4
"""


@pytest.mark.slow
@pytest.mark.mesh
def test_several_processes_start_from_a_file(exported, tmp_path):
    """Each with a part of every array; the mask's row and the heads are new."""
    model = trained.read(exported)
    exporting.export(model, "open_clip", tmp_path / "out", {})
    arrays = dict(reading.read(tmp_path / "out").arrays)
    arrays["token_embedding.weight"] = arrays["token_embedding.weight"][:-1]
    safetensors.numpy.save_file(arrays, tmp_path / "cut.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(rank), str(tmp_path / "cut.safetensors")],
            cwd=Path(__file__).parent.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said


def test_a_run_of_a_version_without_preprocess_is_read(tmp_path):
    setup = Setup(tiny(clip_vit_b32_yfcc15m), jax.devices()[:1])
    like, config = setup.abstract_state, setup.config.record()
    del config["version"], config["eval"]["preprocess"]
    checkpoints = Checkpoints(tmp_path / "old")
    checkpoints.save(init_state(like)().replace(step=np.int32(1)), 16, "data", config, {})
    checkpoints.close()
    assert trained.read_run(tmp_path / "old").model.short_side == 32


@pytest.mark.slow
def test_training_starts_from_it_and_a_restart_does_not(exported, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(exported, source)
    # A rate of 0: the parameters stay what the run started from.
    rates = {"optim.peak_lr": 0.0, "optim.warmup_lr": 0.0}
    config = tiny(clip_vit_b32_yfcc15m, init_from=str(source), **rates)
    state = train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "Starts from" in printed and "left out: mlm_head, predictor, projector" in printed
    model = pretrained.read(exported).variables["params"]
    for name in ("image", "text"):
        assert_same(state.params[name], model[name])
    shutil.rmtree(source)
    assert int(train(config, tmp_path / "run").step) == 1
    printed = capsys.readouterr().out
    assert "Starts from" not in printed and "is finished" in printed


def test_what_cannot_be_started_from_leaves_nothing_behind(exported, tmp_path):
    for changes, message in (
        ({"init_from": str(exported), "model.image.width": 64}, "model.image.width: 32 in it, 64"),
        ({"init_from": str(tmp_path / "typo")}, "typo does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny(clip_vit_b32_yfcc15m, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_other_normalization_and_positions_are_told(exported):
    changes = {"init_from": str(exported), "init_resize": True}
    _, lines = start(tiny(declip_vit_b32_yfcc15m, image_mean=(0.5, 0.5, 0.5), **changes))
    assert any("its images were normalized with mean (0.485, 0.456, 0.406)" in x for x in lines)
    assert not any("interpolated" in line for line in lines)
    changes["model.image.resolution"] = 48
    _, lines = start(tiny(declip_vit_b32_yfcc15m, **changes))
    assert not any("normalized" in line for line in lines)
    assert any("interpolated to 6×6" in line for line in lines)


# --- to evaluate ----------------------------------------------------------------------------------


def scores(capsys):
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return {name: value for name, value in found.items() if "_to_" in name}


def test_an_exported_model_scores_as_the_run(run, exported, tmp_path, capsys, monkeypatch):
    task = ["--task", "retrieval", "--data", "scenes", "--split", "test"]
    command(evaluate, "--workdir", run, *task, monkeypatch=monkeypatch)
    of_run = scores(capsys)
    here = tmp_path / "published"
    command(evaluate, "--init", exported, "--workdir", here, *task, monkeypatch=monkeypatch)
    assert scores(capsys) == of_run and len(of_run) == 8
    found = json.loads((here / "evaluations" / "step_0.json").read_text())
    assert found["results"][0]["settings"]["preprocess"] == "declip"

    # Beside the run on a page, and alone.
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    command(report, here, run, "--out", tmp_path / "page.html", monkeypatch=monkeypatch)
    page = (tmp_path / "page.html").read_text()
    assert "unknown: declip is another program" in page and "come without curves" not in page
    assert "<code>loss.temperature</code>" not in page  # what only one can know is no difference
    command(report, here, "--out", tmp_path / "alone.html", monkeypatch=monkeypatch)
    assert "come without curves" in (tmp_path / "alone.html").read_text()

    # Positions that were fitted, and a page of it.
    fitted = tmp_path / "fitted"
    sizes = ["--image-size", 48, "--context", 20, "--preprocess", "train"]
    command(
        evaluate, "--init", exported, "--workdir", fitted, *task, *sizes, monkeypatch=monkeypatch
    )
    said = capsys.readouterr()
    assert "interpolated to 6×6" in said.err and "cut to 20" in said.err
    assert '"preprocess": "train"' in said.out
    command(report, fitted, "--out", tmp_path / "fitted.html", monkeypatch=monkeypatch)
    assert "width 32, 48 px" in (tmp_path / "fitted.html").read_text()
    # Nothing of it is scored: what the page says to type scores the same model in the same place.
    shutil.rmtree(fitted / "evaluations")
    (imported,) = load_runs([fitted])
    _, _, module, *typed = shlex.split(imported.command())
    assert module == "declip_jax.evaluate" and not imported.names_sets
    with pytest.raises(SystemExit, match="no set of the suite is in --data-dir=FOLDER"):
        command(evaluate, *typed, monkeypatch=monkeypatch)
    assert len(json.loads((fitted / "evaluations" / "step_0.json").read_text())["absent"]) > 10


def test_scores_of_one_model_are_not_taken_for_another_s(
    run, exported, tmp_path, capsys, monkeypatch
):
    task = ["--task", "retrieval", "--data", "scenes", "--split", "test"]
    here = tmp_path / "scores"
    command(evaluate, "--init", exported, "--workdir", here, *task, monkeypatch=monkeypatch)
    before = {path.name: path.read_bytes() for path in here.rglob("*") if path.is_file()}

    # The same arrays, other preprocessing; then in the same place as before; then another model.
    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    notes = json.loads((changed / "declip_jax.json").read_text())
    notes["preprocess"] |= {"mean": [0.1, 0.2, 0.3], "short_side": 48}
    (changed / "declip_jax.json").write_text(json.dumps(notes))
    other = tmp_path / "other"
    exporting.export(trained.read_run(run, step="1").model, "declip", other, {})
    for source in (changed, other):
        with pytest.raises(SystemExit, match="has scores of another model"):
            command(evaluate, "--init", source, "--workdir", here, *task, monkeypatch=monkeypatch)
    assert before == {path.name: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    capsys.readouterr()
    changed_scores = tmp_path / "changed_scores"
    arguments = ["--init", changed, "--workdir", changed_scores]
    command(evaluate, *arguments, *task, monkeypatch=monkeypatch)
    assert "weights (48 px, mean (0.1, 0.2, 0.3)" in capsys.readouterr().out
    shutil.rmtree(changed)
    with pytest.raises(SystemExit, match=f"{changed_scores}: {changed} does not exist"):
        command(report, changed_scores, monkeypatch=monkeypatch)
    shutil.copytree(other, changed)
    with pytest.raises(SystemExit, match=f"{changed} has changed since it was evaluated"):
        command(report, changed_scores, monkeypatch=monkeypatch)
    (changed_scores / "imported.json").write_text('{"weights": 1}')
    with pytest.raises(SystemExit, match="imported.json is not what evaluate writes"):
        command(report, changed_scores, monkeypatch=monkeypatch)


def test_scores_go_to_a_folder_called_as_the_weights(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported / "model.safetensors", "vitb32.pth.tar")
    task = ["--task", "retrieval", "--data", "scenes", "--split", "test"]
    command(evaluate, "--init", "vitb32.pth.tar", *task, monkeypatch=monkeypatch)
    assert (tmp_path / "runs" / "vitb32" / "evaluations" / "step_0.csv").exists()
    assert trained.name_of(exported / "model.safetensors") == "declip"
    assert trained.name_of(exported) == "declip"
    for name, called in (("v1.5.pt", "v1.5"), ("checkpoint.pth.tar", tmp_path.name)):
        (tmp_path / name).touch()
        assert trained.name_of(tmp_path / name) == called


def test_evaluate_says_what_is_wrong(run, exported, tmp_path, capsys, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(SystemExit) as end:
            task = ["--task", "retrieval", "--data", "scenes"]
            command(evaluate, *arguments, *task, monkeypatch=monkeypatch)
        said = capsys.readouterr().err if end.value.code == 2 else str(end.value.code)
        assert message in said

    refused("--workdir or --init is needed")
    refused("--image-size is for --init", "--workdir", run, "--image-size", 64)
    refused("--init-format is for --init", "--workdir", run, "--init-format", "alip")
    refused("--step is for a run's --workdir", "--init", exported, "--step", "3")
    refused("is a run's: give --init one of its own", "--init", exported, "--workdir", run)
    refused("no multiple of 8", "--init", exported, "--image-size", 30, "--workdir", tmp_path / "x")
    assert not (tmp_path / "x").exists()
