import json

import cv2
import numpy as np
import pytest

from declip_jax.report import write_report

GREEN, RED = (0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)


def _write(path, records, end="\n"):
    path.write_text("\n".join(json.dumps(record) for record in records) + end)
    return path


def _read(path):
    return cv2.imread(str(path))[:, :, ::-1]  # BGR -> RGB


def _count(page, colour):
    return int((page == colour).all(axis=-1).sum())


def _match(is_right, height=30, width=40):
    return np.zeros((height, width, 3), np.uint8), is_right


def _records(steps):
    for step in range(1, steps + 1):
        record = {"step": step, "train/loss": 1 / step, "train/top1": 0.5, "train/top5": 0.7}
        record |= {"train/learning_rate": 1e-3, "train/logit_scale": 14.3, "train/pairs_per_s": 99}
        if step % 20 == 0:
            record["val/zeroshot/top1"] = 0.3
            record["val/retrieval/text_to_image_r1"] = 0.2
        yield record


def test_the_page_is_as_high_as_its_panels_and_captions(tmp_path):
    captions = [("A dog .", [_match(rank == 1) for rank in range(5)])] * 3
    every = _write(tmp_path / "every.jsonl", _records(steps=120))
    some = _write(tmp_path / "some.jsonl", [{"step": 5, "train/loss": float("nan")}])
    empty = _write(tmp_path / "empty.jsonl", [], end="")
    out = tmp_path / "report.png"
    heights = {}
    for name, metrics, gallery in (
        ("everything", every, captions),
        ("curves", every, []),
        ("one curve", some, []),
        ("captions", empty, captions),
    ):
        write_report(metrics, gallery, out)
        heights[name], width, _ = _read(out).shape
        assert width == 1600
    assert heights == {"everything": 1210, "curves": 700, "one curve": 400, "captions": 610}


def test_right_images_are_green_and_wrong_ones_red(tmp_path):
    metrics = _write(tmp_path / "metrics.jsonl", [])
    out = tmp_path / "report.png"
    pixels = {}
    for right in (0, 1, 2):
        gallery = [("A dog .", [_match(rank < right) for rank in range(2)])]
        write_report(metrics, gallery, out)
        pixels[right] = _count(_read(out), GREEN), _count(_read(out), RED)
    assert pixels[0][0] == 0 and pixels[2][1] == 0
    assert 0 < pixels[1][0] < pixels[2][0]
    assert 0 < pixels[1][1] < pixels[0][1]


def test_captions_are_plain_text_and_stay_in_their_column(tmp_path):
    metrics = _write(tmp_path / "metrics.jsonl", [])
    gallery = [("costs $\\frac{\nor 5$ " + "and so on " * 50, [_match(True, 50, 20)])]
    write_report(metrics, gallery, tmp_path / "report.png")
    assert (_read(tmp_path / "report.png")[150:, 800:] == 255).all()


def test_a_step_logged_again_replaces_the_first(tmp_path):
    records = [{"step": step, "train/loss": 3.0 / step} for step in range(1, 5)]
    out = tmp_path / "report.png"
    write_report(_write(tmp_path / "metrics.jsonl", records), [], out)
    once = _read(out)
    resumed = records[:2] + [{"step": 4, "train/loss": 9.0}] + records[2:]
    write_report(_write(tmp_path / "metrics.jsonl", resumed, end='\n{"step": 5, "tr'), [], out)
    np.testing.assert_array_equal(_read(out), once)  # nor does the unfinished last line show


def test_refuses_what_it_cannot_draw(tmp_path):
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "report.png"
    _write(metrics, [{"step": 1, "train/other": 1.0}])
    with pytest.raises(ValueError, match="no curves to draw yet"):
        write_report(metrics, [], out)
    metrics.write_text('{"step": 1}\n{"step": 2,\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: not JSON"):
        write_report(metrics, [], out)
    metrics.write_text('{"step": 1}\n{"train/loss": 2}\n')
    with pytest.raises(ValueError, match='metrics.jsonl:2: expected an object with a "step"'):
        write_report(metrics, [], out)
    assert not out.exists()
