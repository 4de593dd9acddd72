"""The quickstart as a newcomer runs it, and the scores that it promises."""

from pathlib import Path

import pytest

from declip_jax.metrics import read_metrics
from tests.commands import run_module


@pytest.mark.slow
def test_quickstart_learns(tmp_path: Path):
    run_module("main", "--config", "configs/quickstart.py", "--workdir", tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["val/zeroshot/images"] == 800  # ten of each of 80 classes
    assert last["val/zeroshot/top1"] >= 0.60
    assert last["val/retrieval/images"] == 256
    assert last["val/retrieval/image_to_text_r1"] >= 0.30
    printed = run_module("report", tmp_path)
    assert "val/zeroshot/top1" in printed
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    page = (tmp_path / "report.html").read_text()
    assert (
        "has not been scored" not in page and f"{100 * last['val/zeroshot/top1']:.1f}</td>" in page
    )
