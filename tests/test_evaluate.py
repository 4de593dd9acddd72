"""The commands that look at a trained model: evaluate and report."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from configs import quickstart
from declip_jax import evaluate, report
from declip_jax.data.tokenizer import EOT
from declip_jax.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    config = quickstart.get_config("tiny").unlock()
    config.total_steps = 2
    config.eval.every = 1
    train(config.lock(), workdir)
    return workdir


def command(module, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def run_module(name, *arguments, codes=(0,)) -> str:
    """Runs `python -m declip_jax.NAME` in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", f"declip_jax.{name}", *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode in codes and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


def test_zeroshot_ends_with_json_and_equals_training_s_own(run, capsys, monkeypatch):
    arguments = ["--workdir", run, "--task", "zeroshot", "--data", "scenes"]
    command(evaluate, *arguments, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    result = last_json(printed)
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("top1", "top5", "mean_per_class"):
        assert result[name] == logged[f"val/zeroshot/{name}"]
    assert result["images"] == 800 and result["split"] == "zeroshot" and result["step"] == 2
    assert "mean_per_class" in printed.splitlines()[-3]  # the table stands above


def test_retrieval_of_a_chosen_step(run, capsys, monkeypatch):
    arguments = ["--workdir", run, "--task", "retrieval", "--data", "scenes", "--step", "1"]
    command(evaluate, *arguments, monkeypatch=monkeypatch)
    result = last_json(capsys.readouterr().out)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert result["step"] == 1 and result["images"] == 256 and result["texts"] == 1280
    assert result["image_to_text_r10"] == first["val/retrieval/image_to_text_r10"]


def test_best_checkpoint(run, capsys, monkeypatch):
    arguments = ["--workdir", run, "--task", "zeroshot", "--data", "scenes", "--step", "best"]
    command(evaluate, *arguments, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(row["val/zeroshot/top1"] for row in rows)
    assert last_json(capsys.readouterr().out)["top1"] == best


def test_devices_that_do_not_share_the_work_evenly(run, monkeypatch):
    """The run's batches of 16 and its set of 64 rows cannot be divided over six devices."""
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    _, encoder, _ = evaluate.load(run)
    assert encoder.encode_text(np.full((5, 32), EOT, np.int32)).shape == (5, 32)
    assert encoder._mesh.size == 4


def test_own_class_names_and_templates(run, tmp_path, capsys, monkeypatch):
    names = [f"thing {i}" for i in range(80)]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    arguments = ["--workdir", run, "--task", "zeroshot", "--data", "scenes"]
    arguments += ["--classes", tmp_path / "classes.txt", "--template", "{}", "--template", "a {}"]
    command(evaluate, *arguments, monkeypatch=monkeypatch)
    assert last_json(capsys.readouterr().out)["images"] == 800


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--workdir", "nowhere"], "--workdir=nowhere holds no checkpoints"),
        (["--step", "77"], "--step=77 is not a checkpoint"),
        (["--data", "nowhere"], "data source 'nowhere'"),
        (["--split", "tset"], "'tset'"),
        (["--split", "test"], "has no classes to choose from"),
        (["--classes", "nowhere.txt"], "--classes nowhere.txt"),
        (["--template", "a photo"], "a photo"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_input_is_named(run, arguments, said, monkeypatch):
    base = ["--workdir", run, "--task", "zeroshot", "--data", "scenes"]
    with pytest.raises(SystemExit) as stop:
        command(evaluate, *base, *arguments, monkeypatch=monkeypatch)
    assert str(stop.value).startswith("error: ") and said in str(stop.value)


def test_report_draws_and_tells(run, capsys, monkeypatch):
    command(report, "--workdir", run, "--captions", "4", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "val/zeroshot/top1" in printed and str(run / "report.png") in printed
    assert cv2.imread(str(run / "report.png")).shape[1] == 1600


@pytest.mark.parametrize("name", ["main", "evaluate", "report", "prepare"])
def test_every_command_has_help(name):
    # absl's --help ends with 1, argparse's with 0
    assert f"python -m declip_jax.{name}" in run_module(name, "--help", codes=(0, 1))
