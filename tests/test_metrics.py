import io
import json

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from declip_jax import metrics


def test_writer_appends_and_drops_steps_that_are_done_again(tmp_path):
    first = metrics.MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": 1.0 / step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # killed while writing
    again = metrics.MetricWriter(tmp_path, 2)
    again.write(3, {"train/loss": 9.0})
    again.close()
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_event_files_hold_the_scalars(tmp_path):
    writer = metrics.MetricWriter(tmp_path, 0)
    writer.write(7, {"train/loss": 0.25})
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), {}
    while data:  # TFRecord: length (8), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
        data = data[16 + size :]
    assert found[7, "train/loss"] == 0.25


def test_meter_averages_and_measures(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])

    def slow_batches():
        while True:
            clock[0] += 0.5
            yield {}

    meter, batches = metrics.Meter(batch_size=32, total_steps=10), slow_batches()
    for loss in (1.0, 2.0, 6.0):
        meter.wait(batches)
        meter.add({"loss": jnp.float32(loss)})
    clock[0] += 6.5
    meter.discount(2.0)  # compiling
    scalars = meter.report(3)
    assert scalars["train/loss"] == 3.0
    assert scalars["train/pairs_per_s"] == pytest.approx(16.0)
    assert scalars["train/pairs_per_s_per_device"] == pytest.approx(
        16.0 / metrics.jax.device_count()
    )
    assert scalars["train/data_wait_share"] == pytest.approx(0.25)
    assert scalars["train/seconds_left"] == pytest.approx(14.0)


SCALARS = {
    "train/loss": 1.5,
    "train/top1": 0.25,
    "train/learning_rate": 1e-3,
    "train/pairs_per_s": 1234.0,
    "train/data_wait_share": 0.02,
    "train/seconds_left": 3725.0,
}


def test_progress_in_a_log_file_is_a_line_a_report():
    stream = io.StringIO()
    progress = metrics.Progress(100, stream)
    progress.show(5, SCALARS)
    progress.show(10, SCALARS)
    progress.say("done")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in stream.getvalue()
    assert "5/100" in lines[0] and "loss 1.5000" in lines[0] and "1:02:05 left" in lines[0]


def test_progress_on_a_terminal_rewrites_one_line():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = metrics.Progress(100, stream)
    progress.show(5, SCALARS)
    progress.show(10, {**SCALARS, "train/seconds_left": 5.0})
    progress.say("done")
    text = stream.getvalue()
    assert text.count("\n") == 2 and text.count("\r") == 2 and text.endswith("\ndone\n")
    first, second = text.split("\n")[0].split("\r")[1:]
    assert len(second) >= len(first)  # nothing of the longer line is left


def test_others_write_below_the_line_that_rewrites_itself():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = metrics.Progress(100, stream)
    progress.end_line()
    progress.show(5, SCALARS)
    progress.end_line()
    progress.end_line()
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith("\n")


def test_progress_on_a_narrow_terminal_is_one_row_and_keeps_the_time_left(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    size = metrics.shutil.os.terminal_size((80, 24))
    monkeypatch.setattr(metrics.shutil, "get_terminal_size", lambda *_, **__: size)
    scalars = {**SCALARS, "train/pairs_per_s": 123_456.0, "train/seconds_left": 200_000.0}
    metrics.Progress(128_000, stream).show(127_999, scalars)
    line = stream.getvalue().removeprefix("\r")
    assert len(line) < 80 and "2d 07:33:20 left" in line


@pytest.fixture
def logging_level():
    before = metrics.jax.config.jax_logging_level
    metrics.jax.config.update("jax_logging_level", "NOTSET")
    yield lambda: metrics.jax.config.jax_logging_level
    metrics.jax.config.update("jax_logging_level", before)


@pytest.mark.parametrize(
    "backend, setting, silenced",
    [("cpu", "1", True), ("cpu", None, True), ("cpu", "0", False), ("gpu", "1", False)],
)
def test_alarms_are_silenced_on_a_cpu_unless_the_user_wants_a_log(
    backend, setting, silenced, logging_level, monkeypatch
):
    monkeypatch.setattr(metrics.jax, "default_backend", lambda: backend)
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    if setting is not None:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", setting)
    metrics.silence_alarms()
    assert (logging_level() == "CRITICAL") == silenced


def test_a_level_that_jax_was_given_stays(logging_level, monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    metrics.jax.config.update("jax_logging_level", "ERROR")
    metrics.silence_alarms()
    assert logging_level() == "ERROR"


@pytest.mark.parametrize(
    "seconds, text",
    [(5, "0:05"), (65.4, "1:05"), (3725, "1:02:05"), (90061, "1d 01:01:01"), (float("inf"), "?")],
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


def test_table_shows_shares_as_percentages():
    text = metrics.table({"top1": 0.5, "images": 256, "image_to_text_median_rank": 2.0})
    assert "50.00 %" in text and "256" in text and "25600" not in text


def test_jsonl_rows_are_json(tmp_path):
    writer = metrics.MetricWriter(tmp_path, 0)
    writer.write(1, {"a": 1.0})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": 1.0}
