"""Finished runs of earlier versions, as they were written then: everything can be done with them.

tests/runs holds them. `continued.jsonl` is what the version that wrote a run logged when it was
given two more steps.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from declip_jax import evaluate, export, main, report
from declip_jax.metrics import is_share, read_metrics
from tests.commands import ROOT

RUNS = Path(__file__).parent / "runs"
OLD = {"clip_vit": "clip_vit_b32_yfcc15m", "declip_resnet": "declip_rn50_yfcc15m"}
# What the runs were started with, beside their configuration's :tiny, in the names of then.
FLAGS = {
    "embed_dim": 8,
    "text.context": 16,
    "heads.projector": 8,
    "heads.predictor": 4,
}
CLIP = FLAGS | {"text.width": 4, "image.patch": 16, "image.width": 8}
DECLIP = FLAGS | {"text.width": 2, "text.heads": 1, "image.width": 4}
BESIDE = {"batch_size": 8, "checkpoint.keep": 1, "checkpoint.every": 4, "total_steps": 6}
BESIDE |= {"loss.support_set.size": 32}
OF_RUN = {
    "clip_vit": {"model": CLIP, "checkpoint.best_metric": "val/zeroshot/top1"},
    "declip_resnet": {"model": DECLIP, "optim.frozen": "('mlm_head/',)"},
}


@pytest.fixture(params=OLD)
def old(request, tmp_path, monkeypatch):
    """A copy of a run, in a folder of the name that it was written with."""
    shutil.copytree(RUNS / request.param, tmp_path / request.param)
    monkeypatch.chdir(tmp_path)
    return Path(request.param)


def test_it_goes_on_as_it_would_have(old, capsys):
    fields = {f"model.{name}": value for name, value in OF_RUN[old.name]["model"].items()}
    fields |= BESIDE | {n: v for n, v in OF_RUN[old.name].items() if n != "model"}
    config = ROOT / "configs" / f"{OLD[old.name]}.py:tiny"
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    main.main([f"--config={config}", f"--workdir={old}", *flags])
    said = capsys.readouterr().out
    assert f"Continuing {old} from step 4 (32 pairs seen)." in said
    assert "changed settings (saved -> now):\n  total_steps: 4 -> 6\n" in said
    assert "data have changed" not in said
    expected = read_metrics(old / "continued.jsonl")
    rows = read_metrics(old / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, then in zip(rows[4:], expected, strict=True):
        assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= then.keys()
        # Not times, nor ranks, which rounding can change where features are much alike.
        others = ("_s", "_device", "_share", "_left", "_dropped", "top1", "top5")
        for name in then:
            if name.startswith("train/") and not name.endswith(others):
                np.testing.assert_allclose(row[name], then[name], rtol=2e-4, err_msg=name)
        assert row.get("train/mlm_dropped") == then.get("train/mlm_dropped")  # mlm_overflow then


def test_it_is_evaluated_and_what_was_scored_then_is_found(old, capsys):
    before = json.loads((old / "evaluations" / "step_4.json").read_text())
    evaluate.main(["--workdir", str(old)])
    assert capsys.readouterr().err.count("scored before") == 2
    evaluate.main(["--workdir", str(old), "--again"])
    after = json.loads((old / "evaluations" / "step_4.json").read_text())
    assert after["checkpoint"] == before["checkpoint"]
    for ours, theirs in zip(after["results"], before["results"], strict=True):
        assert (ours["id"], ours["set"], ours["settings"]) == tuple(
            theirs[name] for name in ("id", "set", "settings")
        )
        shares = {name: x for name, x in theirs["metrics"].items() if is_share(name)}
        for metric, value in shares.items():  # features of so small a model are much alike
            np.testing.assert_allclose(ours["metrics"][metric], value, atol=0.02, rtol=0.02)


def test_it_is_reported(old, capsys):
    report.main([str(old), "--images", "8", "--captions", "2"])
    page = (old / "report.html").read_text()
    assert f"{old}, evaluated during training at step 4" in capsys.readouterr().out
    assert "4 of 4" in page and ("ViT/16, 2 layers" in page or "ResNet 1-1-1-1" in page)


def test_it_is_exported(old, capsys):
    export.main(["--workdir", str(old), "--format", "declip", "--output", "out"])
    assert "Wrote out" in capsys.readouterr().out
    notes = json.loads(Path("out/declip_jax.json").read_text())
    assert notes["step"] == 4 and notes["samples"] == 32
