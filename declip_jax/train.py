"""The training loop."""

import contextlib
import time
from pathlib import Path

import clu.parameter_overview
import jax

from declip_jax import init_from, workdirs
from declip_jax.after_step import (
    Evaluate,
    Interrupt,
    KeepScores,
    Moment,
    Profile,
    Report,
    Save,
    Write,
    check_best_metric,
)
from declip_jax.checkpoint import CheckpointError, Checkpoints, config_differences
from declip_jax.config import Config
from declip_jax.data.pipeline import digest
from declip_jax.data.sources import Source, open_data
from declip_jax.evals import suite
from declip_jax.metrics import Meter, Progress, duration, silence_alarms
from declip_jax.parallel.mesh import shard_batch
from declip_jax.state import TrainState
from declip_jax.step import Setup, check_training


def train(config, workdir: Path) -> TrainState:
    """Trains until `config.total_steps`, continuing from the workdir's newest checkpoint.

    `config` is a `Config`, or a ConfigDict to read it from. SIGINT and SIGTERM end the run with a
    checkpoint of the step in hand; the same call continues. A ValueError names field and value.
    """
    config = Config.read(config)
    progress, interrupt = Progress(config.total_steps), Interrupt()
    prepare_jax(config.compilation_cache, bool(config.profile.steps), progress)
    setup = Setup(config)
    check_training(setup)
    tasks, absent = tasks_of(config, progress)
    source, data = open_fitting(setup)

    checkpoints, now = start_or_continue(setup, source, data, workdir, progress)
    if now.step >= config.total_steps:
        return now.state
    record = config.record()
    workdirs.describe(workdir, record, now.state.params)
    progress.say(summary(setup, now.state, source, workdir))
    meter = Meter(config.batch_size, config.total_steps)
    step = Step(setup, meter, progress)
    batches = setup.batches(source, now.samples, progress.say)
    last, best_metric = config.total_steps, config.checkpoint.best_metric
    evaluate = Evaluate(
        config.eval.every, last, tasks, setup.encoder(), best_metric, progress, interrupt
    )
    save = Save(
        config.checkpoint, last, record, data, checkpoints, meter, workdir, interrupt, now.step
    )
    parts = (
        Profile(config.profile.steps, workdir),
        Report(config.log_every, (evaluate, save), meter, batches, progress, workdir, interrupt),
        evaluate,
        Write(workdir, now.step),
        save,
        KeepScores(workdir, absent, progress),
    )
    started = time.perf_counter()
    with interrupt, contextlib.ExitStack() as stack:
        for part in (*parts, batches):  # closed from the last on
            stack.callback(part.close)
        while now.step < config.total_steps and not interrupt.asked:
            for part in parts:
                part.before(now.step + 1)
            try:
                batch = meter.wait(batches)
            except (ValueError, RuntimeError):  # too many unusable records, a worker killed
                if interrupt.asked:
                    break  # SIGTERM to the whole group of processes ends the workers at once
                save.rest(now)
                raise
            state, metrics = step(now.state, batch)
            now = Moment(now.step + 1, now.samples + config.batch_size, state, metrics)
            for part in parts:
                part.after(now)
        save.rest(now)
    progress.say(ending(now, config.total_steps, started, workdir))
    return now.state


def prepare_jax(cache: str, profiles: bool, progress: Progress) -> None:
    """Silences XLA's alarms, and keeps compiled programs in `cache`, if there is one and it is
    safe."""
    silence_alarms()
    # jaxlib 0.10.2: a CPU program that came out of the cache crashes when it is profiled, and
    # with several devices can wait for ever in its collectives.
    profiled_or_split = profiles or jax.device_count() > 1
    if cache and jax.default_backend() == "cpu" and profiled_or_split:
        progress.say(
            "config.compilation_cache is not used on a CPU that is profiled or split into several "
            "devices."
        )
    elif cache:
        jax.config.update("jax_compilation_cache_dir", cache)


def tasks_of(config: Config, progress: Progress) -> tuple[list[suite.Task], list[dict[str, str]]]:
    """What is scored during training, and what is absent, which is told."""
    tasks, absent = [], []
    if config.eval.every:
        common = suite.shared(config.eval, config.preprocess)
        tasks, absent = suite.build(config.eval, common)
    for one in absent:
        progress.say(f"Not evaluated: {one['task']} on {one['set']}: {one['why']}")
    check_best_metric(config.checkpoint.best_metric, tasks)
    return tasks, absent


def open_fitting(setup: Setup) -> tuple[Source, str]:
    """The run's data, and their digest. What does not fit them is refused, before anything is
    written."""
    source = open_data(setup.config.data)
    setup.batches(source).close()
    return source, digest(source)


def start_or_continue(
    setup: Setup, source: Source, data: str, workdir: Path, progress: Progress
) -> tuple[Checkpoints, Moment]:
    """Creates the workdir, or finds the run that it has. `data` is the digest of its `source`.

    Returns:
      Its checkpoints; and where it is. They are closed if no step is left to do.

    Raises:
      ValueError: the workdir cannot be written to or holds a run of another model, or
        `config.init_from` does not fit.
    """
    config, say = setup.config, progress.say

    def first_state() -> TrainState:
        say("Initializing the parameters …")
        if config.init_from:
            return init_from.start(setup, say)
        return setup.init_state()

    workdirs.check(workdir)
    # A model to start a new run from that does not fit is refused before anything is written.
    is_new = not (workdir / "checkpoints").is_dir()
    first = first_state() if is_new and config.init_from else None
    workdirs.create(workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.best_metric)
    latest = checkpoints.latest()
    if latest is None:
        return checkpoints, Moment(0, 0, first or first_state())
    record = checkpoints.record(latest)
    check_same_model(record["config"], config, workdir, progress)
    state = checkpoints.restore(latest, setup.abstract_state)
    if latest >= config.total_steps:
        say(
            f"{workdir} is finished: step {latest} of {config.total_steps}. To train on, set "
            "config.total_steps higher; to start anew, choose another workdir."
        )
        checkpoints.close()
    else:
        say(f"Continuing {workdir} from step {latest} ({record['samples']:,} pairs seen).")
        if record.get("data", data) != data:
            say(
                f"The data have changed (now {len(source):,} records): from here on other samples "
                "come than would have come, and some of this epoch come again."
            )
    return checkpoints, Moment(latest, record["samples"], state)


def summary(setup: Setup, state: TrainState, source: Source, workdir: Path) -> str:
    """What a run tells of itself as it starts, in lines."""
    config, mesh = setup.config, setup.mesh
    count = clu.parameter_overview.count_parameters
    parts = {name: int(count(state.params[name])) for name in ("image", "text")}
    total = int(count(state.params))
    parts["heads and scales"] = total - sum(parts.values())
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    rows = {
        "method": f"{config.method}, {config.batch_size:,} pairs a step",
        "parameters": f"{total:,}: " + ", ".join(f"{n} {size:,}" for n, size in parts.items()),
        "devices": f"{mesh.size} × {mesh.devices.flat[0].device_kind}, mesh {shape}",
        "data": f"{len(source):,} records in {source}",
        "steps": f"{int(state.step):,} of {config.total_steps:,} done",
        "table": f"{workdir / workdirs.PARAMETERS} lists the parameters",
    }
    return "\n".join(f"  {name:<11} {text}" for name, text in rows.items())


def ending(now: Moment, total_steps: int, started: float, workdir: Path) -> str:
    """What a run tells as it ends."""
    if now.step < total_steps:
        return f"Interrupted at step {now.step} and saved. The same command continues."
    took = duration(time.perf_counter() - started)
    return (
        f"Finished step {now.step} in {took}: {workdir} holds checkpoints, metrics.jsonl and "
        "TensorBoard events."
    )


class Step:
    """The compiled training step; tells when it compiles, for each length of captions."""

    def __init__(self, setup: Setup, meter: Meter, progress: Progress):
        self._step, self._mesh = setup.jit_train_step(), setup.mesh
        self._meter, self._say = meter, progress.say
        self._lengths: set[int] = set()  # that it was compiled for
        self._started = time.perf_counter()

    def __call__(self, state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        length = batch["tokens"].shape[-1]
        if length in self._lengths:
            return self._run(state, batch)
        kind = f" for captions of {length} tokens" if self._lengths else ""
        self._say(f"Compiling the training step{kind} …")
        calling = time.perf_counter()
        done = self._run(state, batch)
        self._meter.discount(time.perf_counter() - calling)  # not a matter of throughput
        if not self._lengths:
            self._say(f"First step after {duration(time.perf_counter() - self._started)}.")
        self._lengths.add(length)
        return done

    def _run(self, state, batch):
        state, metrics = self._step(state, shard_batch(batch, self._mesh))
        self._meter.add(metrics)
        return state, metrics


def check_same_model(saved: dict, config: Config, workdir: Path, progress: Progress) -> None:
    """Raises CheckpointError if the saved run is of another model; tells of other changes."""
    before = Config.recorded(saved, str(workdir))
    model, other = config_differences(before.record(), config.record())
    if model:
        raise CheckpointError(
            f"{workdir} holds a run of another model (saved -> now):\n  "
            + "\n  ".join(model)
            + "\nUse its configuration, or another workdir."
        )
    if other:
        progress.say("Continuing with changed settings (saved -> now):\n  " + "\n  ".join(other))
