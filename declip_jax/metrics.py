"""What a run shows: metrics to the console, JSONL and TensorBoard, throughput, progress."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from declip_jax.files import write_text

_RENAMED = {"train/mlm_overflow": "train/mlm_dropped"}  # metrics of earlier versions


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and TensorBoard event files in the workdir.

    A restarted run appends; `resume_step` cuts away lines of steps that will be done again, so
    that each step stands in the file once.
    """

    def __init__(self, workdir: Path, resume_step: int):
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._jsonl = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir), purge_step=resume_step + 1, write_to_disk=True)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
        self._jsonl.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._jsonl.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last one cut short by a kill, or still being written, is
    left out.

    Raises ValueError: another line that is not an object with a "step", by number.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(
                f'{path}:{number}: expected an object with a "step", got {line[:80]!r}'
            )
        rows.append({_RENAMED.get(name, name): value for name, value in row.items()})
    return rows


class Meter:
    """Averages the steps' metrics between two reports and measures throughput.

    Metrics stay on the device until `report`; `add` waits for the step before last, so that the
    host is never more than two steps ahead and the time it waits for data is told truthfully.
    """

    def __init__(self, batch_size: int, total_steps: int):
        self._batch_size = batch_size
        self._total_steps = total_steps
        self._seconds_per_step = None  # a slow moving average, for the time left
        self.restart()

    def restart(self) -> None:
        """Begins a new window; call it after anything that is not training."""
        self._pending = []
        self._data_seconds = 0.0
        self._start = time.perf_counter()

    def wait(self, batches: Iterator[Any]) -> Any:
        """The next batch; counts the time that is spent waiting for it."""
        start = time.perf_counter()
        batch = next(batches)
        self._data_seconds += time.perf_counter() - start
        return batch

    def discount(self, seconds: float) -> None:
        """Leaves `seconds` out of the window, e.g. those spent compiling."""
        self._start += seconds

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._pending.append(metrics)
        if len(self._pending) > 2:
            jax.block_until_ready(self._pending[-3])

    def report(self, step: int) -> dict[str, float]:
        """Mean of each metric since the last report, and throughput; begins a new window.

        Empty if there was no step.
        """
        steps = len(self._pending)
        if not steps:
            return {}
        pending = jax.device_get(self._pending)
        scalars = {
            f"train/{name}": float(np.mean([metrics[name] for metrics in pending]))
            for name in pending[0]
        }
        elapsed = time.perf_counter() - self._start
        per_step = elapsed / steps
        if self._seconds_per_step is None:
            self._seconds_per_step = per_step
        self._seconds_per_step += 0.3 * (per_step - self._seconds_per_step)
        scalars |= {
            "train/pairs_per_s": self._batch_size / per_step,
            "train/pairs_per_s_per_device": self._batch_size / per_step / jax.device_count(),
            "train/data_wait_share": self._data_seconds / elapsed,
            "train/seconds_left": self._seconds_per_step * (self._total_steps - step),
        }
        self.restart()
        return scalars


class Progress:
    """Progress for a person: one line that rewrites itself on a terminal, else a line a report."""

    def __init__(self, total_steps: int, stream=None):
        self._total = total_steps
        self._stream = stream or sys.stdout
        self._rewrites = self._stream.isatty()
        self._width = 0

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        line = (
            f"step {step:>{len(str(self._total))}}/{self._total}"
            f"  loss {scalars['train/loss']:.4f}"
            f"  top-1 {100 * scalars['train/top1']:.1f} %"
            f"  {duration(scalars['train/seconds_left'])} left"
            f"  {scalars['train/pairs_per_s']:,.0f} pairs/s"
            # What a narrow terminal cuts off.
            f"  data wait {100 * scalars['train/data_wait_share']:.0f} %"
            f"  lr {scalars['train/learning_rate']:.2e}"
        )
        if self._rewrites:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line would stay
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.end_line()
        self._stream.write(text + "\n")
        self._stream.flush()

    def end_line(self) -> None:
        """Leaves the line that rewrites itself as it is: others may write after it."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def silence_alarms() -> None:
    """Keeps XLA's alarms about slow compilation, a screen of text each, from the terminal.

    On a slow machine a training step compiles for minutes, which is told in a line of our own. With
    the alarms goes all that C++ and JAX log short of fatal errors; exceptions come as ever. So only
    on a CPU, whose backend is started before: why it is the CPU's, as a driver that does not load,
    is still said. JAX_LOGGING_LEVEL and TF_CPP_MIN_LOG_LEVEL in the environment are left alone.
    """
    default = jax.default_backend() == "cpu" and jax.config.jax_logging_level in (None, "NOTSET")
    # jaxlib sets 1 where it is not set.
    if default and os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        jax.config.update("jax_logging_level", "CRITICAL")


def duration(seconds: float) -> str:
    """Seconds as "1d 02:03:04", "2:03:04" or "3:04"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def table(rows: Mapping[str, float]) -> str:
    """Evaluation metrics as lines of name and value; shares (0..1 floats) as percentages."""
    width = max(len(name) for name in rows)
    return "\n".join(
        f"  {name:<{width}}  " + (f"{100 * value:7.2f} %" if is_share(name) else f"{value:9,.6g}")
        for name, value in rows.items()
    )


def is_share(name: str) -> bool:
    """Whether a metric of an evaluation is a fraction, and no count, rank or setting."""
    return not name.endswith(("images", "texts", "median_rank", "lambda"))
