"""What happens around a training step beside the step itself: a part each, all with one interface.

The loop asks the parts in their order, and each adds to the `Moment` what those after it may want:
`Report` the numbers of the steps, `Evaluate` the scores, `Save` the checkpoint.
"""

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from declip_jax import results
from declip_jax.checkpoint import CheckpointPolicy, Checkpoints
from declip_jax.data.pipeline import TrainBatches
from declip_jax.encode import Encoder
from declip_jax.evals import suite
from declip_jax.hints import did_you_mean
from declip_jax.metrics import Meter, MetricWriter, Progress, table
from declip_jax.state import TrainState


class Interrupt:
    """While open, the first SIGINT or SIGTERM only sets `asked`; a second SIGINT stops at once."""

    asked = False

    def __enter__(self) -> "Interrupt":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        del frame
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: it may be what was interrupted.
        os.write(2, b"\nStopping after this step; Ctrl-C again stops without saving.\n")

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class Moment:
    """Where a run is: at its start, or after a step."""

    step: int
    samples: int  # that it has seen
    state: TrainState
    metrics: dict[str, jax.Array] = field(default_factory=dict)  # of the step, on the devices
    scalars: dict[str, float] = field(default_factory=dict)  # to log; empty if nothing is due
    found: suite.Found | None = None  # by an evaluation; None: there was none
    checkpoint: str = ""  # digest of the one that was saved now

    @property
    def scores(self) -> dict[str, float]:
        """What was found, by the names of a run's metrics."""
        return suite.logged(self.found or [])


class Part:
    """Something that happens around steps."""

    def before(self, step: int) -> None:
        """Called before the batch of a step is waited for."""

    def due(self, step: int) -> bool:
        """Whether it wants a report of this step."""
        return False

    def after(self, now: Moment) -> None:
        """Called after each step."""

    def close(self) -> None:
        """Called once, also after an error."""


class Profile(Part):
    """An XLA profile of steps first … last, written where TensorBoard's profile plugin looks.

    A run that is resumed or ends between them has the steps that it did.
    """

    def __init__(self, steps: tuple[int, ...], workdir: Path):
        self._steps = range(steps[0], steps[1] + 1) if steps else ()
        self._workdir = workdir
        self._running = False

    def before(self, step: int) -> None:
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._workdir))
            self._running = True

    def after(self, now: Moment) -> None:
        if self._running and now.step + 1 not in self._steps:
            jax.block_until_ready(now.metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


@dataclass
class Report(Part):
    """Shows how training goes: every so many steps, and where another part is due.

    `after` raises FloatingPointError if loss or gradients are no numbers any more.
    """

    every: int
    others: Sequence[Part]
    meter: Meter
    batches: TrainBatches
    progress: Progress
    workdir: Path
    interrupt: Interrupt
    reported: bool = False

    def before(self, step: int) -> None:
        if self.reported:  # what came after the report was no training
            self.meter.restart()
            self.reported = False

    def due(self, step: int) -> bool:
        return step % self.every == 0 or any(part.due(step) for part in self.others)

    def after(self, now: Moment) -> None:
        if self.due(now.step) or self.interrupt.asked:
            now.scalars = self.meter.report(now.step) | self.batches.metrics()
            self.progress.show(now.step, now.scalars)
            check_finite(now.scalars, now.step, self.workdir)
            self.reported = True


@dataclass
class Evaluate(Part):
    """Scores the model every so many steps, and after the last one."""

    every: int
    last: int  # the step after which the run is finished
    tasks: list[suite.Task]
    encoder: Encoder
    best_metric: str
    progress: Progress
    interrupt: Interrupt  # leaves out the tasks that are left

    def due(self, step: int) -> bool:
        return bool(self.tasks) and (step == self.last or step % self.every == 0)

    def after(self, now: Moment) -> None:
        if not self.due(now.step):
            return
        self.progress.end_line()  # the bars of an evaluation clear the line that they are on
        encoder = self.encoder.use(now.state.eval_params, now.state.model_state)
        now.found, failed = suite.run(self.tasks, encoder, lambda: self.interrupt.asked)
        for line in failed:
            self.progress.say(f"Evaluation failed: {line}")
        if now.scores:
            self.progress.say(f"Evaluation at step {now.step}:\n{table(now.scores)}")
        if self.best_metric and self.best_metric not in now.scores:
            self.progress.say(
                f"This evaluation has no config.checkpoint.best_metric={self.best_metric!r}: its "
                "checkpoint will not be the best."
            )


class Write(Part):
    """Writes what was reported, and scores, to metrics.jsonl and TensorBoard's events."""

    def __init__(self, workdir: Path, resume_step: int):
        self._writer = MetricWriter(workdir, resume_step)

    def close(self) -> None:
        self._writer.close()

    def after(self, now: Moment) -> None:
        if now.scalars:
            self._writer.write(now.step, now.scalars | now.scores)


@dataclass
class Save(Part):
    """Saves every so many steps, after the last one, and with scores that are needed."""

    policy: CheckpointPolicy
    last: int  # the step after which the run is finished
    config: dict[str, Any]  # the run's `Config.record`
    data: str  # the data's digest
    checkpoints: Checkpoints
    meter: Meter
    workdir: Path
    interrupt: Interrupt  # has what was scored so far saved
    saved: int  # the step that there is a checkpoint of, or 0

    def due(self, step: int) -> bool:
        return step == self.last or step % self.policy.every == 0

    def after(self, now: Moment) -> None:
        needed = self.policy.best_metric or self.interrupt.asked
        if self.due(now.step) or (needed and now.found is not None):
            self._save(now)

    def rest(self, now: Moment) -> None:
        """Saves what has not been saved. Raises FloatingPointError if it is no numbers."""
        if now.step != self.saved:
            check_finite(self.meter.report(now.step), now.step, self.workdir)
            self._save(now)

    def _save(self, now: Moment) -> None:
        run = self.data, self.config
        now.checkpoint = self.checkpoints.save(now.state, now.samples, *run, now.scores)
        self.saved = now.step

    def close(self) -> None:
        self.checkpoints.close()


@dataclass
class KeepScores(Part):
    """Writes the scores of a saved model down, so that nothing is scored twice."""

    workdir: Path
    absent: list[dict[str, str]]  # of `suite.build`
    progress: Progress

    def after(self, now: Moment) -> None:
        # Of all processes the first writes such files.
        if now.found is not None and now.checkpoint and jax.process_index() == 0:
            try:
                results.keep(self.workdir, now.step, now.checkpoint, now.found, self.absent)
            except (ValueError, OSError) as error:
                self.progress.say(f"The scores are in metrics.jsonl alone: {error}")


def check_best_metric(name: str, tasks: Sequence[suite.Task]) -> None:
    """Raises ValueError unless `name` is empty or a metric that `tasks` compute."""
    known = [f"val/{task.name}/{metric}" for task in tasks for metric in task.metrics]
    if name and name not in known:
        raise ValueError(
            f"config.checkpoint.best_metric={name!r} is not computed during training."
            f"{did_you_mean(name, known)} The evaluations of this run give "
            f"{known or 'nothing (config.eval.every is 0)'}."
        )


def check_finite(scalars: dict[str, float], step: int, workdir: Path) -> None:
    """Raises FloatingPointError if loss or gradients are no numbers any more, before a save."""
    for name in ("loss", "grad_norm"):
        value = scalars.get(f"train/{name}", 0.0)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}; nothing was saved since. The same command "
                f"continues from the newest of {workdir / 'checkpoints'} (move folders away to go "
                "further back): give it a lower config.optim.peak_lr, a longer warm-up, or "
                "config.optim.clip_norm=1."
            )
