"""The commands that look at a trained model: evaluate and report."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from declip_jax import evaluate, trained
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.evals import suite
from declip_jax.report.runs import load_runs
from declip_jax.report.scores import scores
from declip_jax.train import train
from tests import make_runs


@pytest.fixture(scope="module")
def run(declip_run, tmp_path_factory) -> Path:
    """Four steps, of which two are evaluated and saved: on the scenes, and by the suite."""
    copy = shutil.copytree(declip_run, tmp_path_factory.mktemp("evaluate") / "declip")
    return copy / "run"


@pytest.fixture(scope="module")
def suite_file(declip_run) -> Path:
    return declip_run / "suite.py"


@pytest.fixture(scope="module")
def printed(declip_run) -> str:
    return (declip_run / "printed").read_text()


def command(module, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


def test_zeroshot_ends_with_json_and_equals_training_s_own(run, capsys, monkeypatch):
    arguments = ["--workdir", run, "--task", "zeroshot", "--data", "scenes", "--again"]
    command(evaluate, *arguments, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    result = last_json(printed)
    logged = rows_of(run)[-1]
    for name in ("top1", "top5", "mean_per_class"):
        assert result[name] == logged[f"val/zeroshot/{name}"]
    assert result["images"] == 800 and result["split"] == "zeroshot" and result["step"] == 4
    assert "mean_per_class" in printed.splitlines()[-3]  # the table stands above


def test_retrieval_of_a_chosen_step(run, capsys, monkeypatch):
    arguments = ["--workdir", run, "--task", "retrieval", "--data", "scenes", "--step", "2"]
    arguments += ["--again"]
    command(evaluate, *arguments, monkeypatch=monkeypatch)
    result = last_json(capsys.readouterr().out)
    (first,) = (row for row in rows_of(run) if row["step"] == 2)
    assert result["step"] == 2 and result["images"] == 256 and result["texts"] == 1280
    assert result["image_to_text_r10"] == first["val/retrieval/image_to_text_r10"]


def test_best_checkpoint(run, capsys, monkeypatch):
    arguments = ["--workdir", run, "--task", "zeroshot", "--data", "scenes", "--step", "best"]
    arguments += ["--again"]
    command(evaluate, *arguments, monkeypatch=monkeypatch)
    rows = [row for row in rows_of(run) if row["step"] in (2, 4)]
    best = max(rows, key=lambda row: row["val/scenes/retrieval/text_to_image_r10"])
    result = last_json(capsys.readouterr().out)
    assert result["step"] == best["step"] and result["top1"] == best["val/zeroshot/top1"]


@pytest.mark.mesh
def test_devices_that_do_not_share_the_work_evenly(tmp_path, monkeypatch):
    """The run's batches of 16 and its set of 64 rows cannot be divided over six devices."""
    make_runs.make_run(tmp_path / "run", make_runs.declip_config(tmp_path), steps=(1,))
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    encoder = trained.load(tmp_path / "run").encoder
    assert encoder.encode_text(np.full((5, 32), CLIP_TOKENIZER.end, np.int32)).shape == (5, 32)
    assert encoder.mesh.size == 4


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
        (["--workdir", "nowhere"], "nowhere holds no checkpoints"),
        (["--step", "77"], "--step=77 is not a checkpoint"),
        (["--data", "nowhere"], "data source 'nowhere'"),
        (["--split", "tset"], "'tset'"),
        (["--split", "test"], "has no classes to choose from"),
        (["--classes", "nowhere.txt"], "--classes nowhere.txt"),
        (["--template", "a photo"], "a photo"),
        (["--set", "cifra10"], "set 'cifra10' is unknown. Did you mean 'cifar10'?"),
        (["--set", "dtd", "--data-dir", "nowhere"], "no classes, as dtd needs them"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_input_is_named(run, arguments, said, monkeypatch):
    base = ["--workdir", run, "--task", "zeroshot", "--data", "scenes"]
    with pytest.raises(SystemExit) as stop:
        command(evaluate, *base, *arguments, monkeypatch=monkeypatch)
    assert str(stop.value).startswith("error: ") and said in str(stop.value)


def test_suite(run, suite_file, capsys, monkeypatch):
    arguments = ["--workdir", run, "--suite", suite_file]  # in the run's own config.eval.data_dir
    seen = []
    for again in ([], [], ["--again"]):
        with pytest.raises(SystemExit) as stop:
            command(evaluate, *arguments, *again, monkeypatch=monkeypatch)
        assert "broken.jpg cannot be read" in str(stop.value)  # the others are scored all the same
        printed = capsys.readouterr()
        assert "Not on this machine: dtd." in printed.err
        assert "scenes, zeroshot, top1" in printed.out
        seen.append(printed.err.count("scored before"))
    assert seen == [2, 2, 0]  # training has scored them
    written = json.loads((run / "evaluations" / "step_4.json").read_text())
    zeroshot, retrieval = written["results"][-2:]  # other tests have added theirs
    logged = rows_of(run)[-1]
    assert zeroshot["metrics"]["top1"] == logged["val/zeroshot/top1"]
    assert sum(row["images"] for row in zeroshot["classes"]) == 800
    assert retrieval["metrics"]["texts"] == 256
    (absent,) = written["absent"]
    assert absent["set"] == "dtd" and str(suite_file.parent / "dtd") in absent["why"]


def test_what_training_scored_is_not_scored_again(run, capsys, monkeypatch):
    def score(*_):
        raise ValueError("this was not scored before")

    monkeypatch.setattr(suite, "score", score)
    for step in (2, 4):
        with pytest.raises(SystemExit) as stop:
            command(evaluate, "--workdir", run, "--step", step, monkeypatch=monkeypatch)
        # The folder with a picture that cannot be read has failed in training, too.
        assert re.fullmatch("error: .*birds/zeroshot: this was not scored before", str(stop.value))
        printed = capsys.readouterr()
        assert printed.err.count("scored before") == 4
        assert f"{run} at step {step}, by the metric that papers report:" in printed.out


def test_the_report_shows_what_training_scored(run):
    (loaded,) = load_runs([run])
    logged = rows_of(run)[-1]
    shown = {one.task: one.series[0] for one in scores([loaded])}
    assert shown.keys() == {"zeroshot", "retrieval", "linear_probe"}
    assert shown["zeroshot"].detail == "step 4"
    assert 100 * logged["val/zeroshot/top1"] in shown["zeroshot"].values.values()
    assert list(shown["linear_probe"].absent) == ["dtd"]
    (own,) = (  # other tests have scored it with other names of classes
        result
        for result in loaded.evaluation["results"]
        if result["task"] == "zeroshot" and not result["settings"]["classes"]
    )
    assert own["metrics"]["top1"] == logged["val/zeroshot/top1"]
    assert sum(one["images"] for one in own["classes"]) == 800
    assert loaded.command() == f"python -m declip_jax.evaluate --workdir {run}"


def test_scores_of_steps_that_the_run_has_not_reached_again_are_left_out(run):
    first, later = (run / "evaluations" / f"step_{step}.json" for step in (2, 5))
    later.write_text(first.read_text().replace('"step": 2', '"step": 5'))
    try:
        (loaded,) = load_runs([run])
    finally:
        later.unlink()
    assert {result["step"] for result in loaded.evaluation["results"]} == {4}


def test_a_run_says_what_it_is_and_where_its_parameters_are_listed(run, printed, declip_run):
    assert "  method      declip, 16 pairs a step\n" in printed
    assert "10,000,000 records in scenes 'train'" in printed and "0 of 4 done" in printed
    numbers = re.search(
        r"parameters +([\d,]+): image ([\d,]+), text ([\d,]+), .* ([\d,]+)", printed
    )
    total, *parts = (int(number.replace(",", "")) for number in numbers.groups())
    assert total == sum(parts) and min(parts) > 1000
    assert f"{declip_run}/run/parameters.txt lists the parameters" in printed
    table = (run / "parameters.txt").read_text()
    assert "text/token_embedding/embedding" in table and f"Total: {total:,}" in table
    assert "text/token_embedding" not in printed
    # Before what takes long, what is waited for.
    starts = [printed.index(said) for said in ("Initializing", "Compiling the", "First step after")]
    assert starts == sorted(starts)


def test_in_training_a_suite_chooses_the_best_checkpoint(printed, suite_file, tmp_path):
    assert "Not evaluated: linear_probe on dtd" in printed
    assert printed.count("Evaluation failed") == 2 and "broken.jpg cannot be read" in printed
    config = make_runs.declip_config(suite_file.parent).unlock()
    config.eval.suite = str(suite_file)
    config.checkpoint.best_metric = "val/scenes/retrieval/text_to_image_r11"
    with pytest.raises(ValueError, match="Did you mean 'val/scenes/retrieval/text_to_image_r1"):
        train(config.lock(), tmp_path / "other")
