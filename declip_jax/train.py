"""The training loop."""

import contextlib
import difflib
import math
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp

from declip_jax import augment, initial
from declip_jax.checkpoint import CheckpointError, Checkpoints, config_differences, to_json
from declip_jax.data.pipeline import digest
from declip_jax.data.sources import Source, open_data
from declip_jax.data.tokenizer import EOT, VOCAB_SIZE
from declip_jax.encode import Encoder
from declip_jax.evals import suite
from declip_jax.evals.preprocess import preprocess
from declip_jax.metrics import Meter, MetricWriter, Progress, duration, silence_alarms, table
from declip_jax.parallel.mesh import check_batch_size, shard_batch
from declip_jax.state import TrainState
from declip_jax.step import Setup

PARAMETERS = "parameters.txt"  # in the workdir, a table of them


def train(config, workdir: Path) -> TrainState:
    """Trains until `config.total_steps`, continuing from the workdir's newest checkpoint.

    SIGINT and SIGTERM end the run after the step in hand with a checkpoint; the same call
    continues. Every ValueError is about the configuration or the data, and names the field.

    Returns:
      The last state.
    """
    progress = Progress(config.total_steps)
    silence_alarms()
    if config.compilation_cache:
        # jaxlib 0.10.2: a CPU program that came out of the cache crashes when it is profiled, and
        # with several devices can wait for ever in its collectives.
        if jax.default_backend() == "cpu" and (config.profile.steps or jax.device_count() > 1):
            progress.say(
                "config.compilation_cache is not used on a CPU that is profiled or split into "
                "several devices."
            )
        else:
            jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    setup = Setup(config)
    check_config(config, setup)
    tasks, absent = suite.build(config) if config.eval.every else ([], [])
    for one in absent:
        progress.say(f"Not evaluated: {one['task']} on {one['set']}: {one['why']}")
    best_metric = config.checkpoint.best_metric
    check_best_metric(best_metric, tasks)
    source = open_data(config.data)
    setup.batches(source).close()  # refuses what does not fit the data before anything is written

    data = digest(source)

    def first_state() -> TrainState:
        progress.say("Initializing the parameters …")
        if config.init_from:
            return initial.start(config, setup.init_state, progress.say)
        return setup.init_state()

    check_workdir(workdir)
    # A model to start a new run from that does not fit is refused before anything is written, too.
    is_new = not (workdir / "checkpoints").is_dir()
    first = first_state() if is_new and config.init_from else None

    prepare_workdir(workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, best_metric)
    latest = checkpoints.latest()
    if latest is None:
        state, samples = first or first_state(), 0
    else:
        record = checkpoints.record(latest)
        check_same_model(record["config"], config, workdir, progress)
        state, samples = checkpoints.restore(latest, setup.abstract_state), record["samples"]
        if latest >= config.total_steps:
            progress.say(
                f"{workdir} is finished: step {latest} of {config.total_steps}. To train on, set "
                "config.total_steps higher; to start anew, choose another workdir."
            )
            checkpoints.close()
            return state
        progress.say(f"Continuing {workdir} from step {latest} ({samples:,} pairs seen).")
        if record.get("data", data) != data:
            progress.say(
                f"The data have changed (now {len(source):,} records): from here on other samples "
                "come than would have come, and some of this epoch come again."
            )
    (workdir / "config.json").write_text(to_json(config), encoding="utf-8")
    parameters = clu.parameter_overview.get_parameter_overview(state.params)
    is_first = jax.process_index() == 0  # of the processes, the one that writes such files
    if is_first:
        (workdir / PARAMETERS).write_text(parameters + "\n", encoding="utf-8")
    progress.say(summary(setup, state, source, workdir))

    step = int(state.step)
    train_step = setup.jit_train_step()
    encoder = Encoder(setup.method, config, setup.mesh)
    batches = setup.batches(source, samples, progress.say)
    writer = MetricWriter(workdir, step)
    meter = Meter(config.batch_size, config.total_steps)
    profile = Profile(config.profile.steps, workdir)
    saved = step
    compiled = set()  # lengths of captions that the step has been compiled for
    started = time.perf_counter()

    def save_rest() -> None:
        if step != saved:
            check_finite(meter.report(step), step, workdir)
            checkpoints.save(state, samples, data, config, {})

    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        for part in (checkpoints, writer, profile, batches):
            stack.callback(part.close)
        while step < config.total_steps and not interrupt.asked:
            profile.before(step + 1)
            waiting = time.perf_counter()
            try:
                batch = next(batches)
            except (ValueError, RuntimeError):  # too many unusable records, a worker killed
                if interrupt.asked:
                    break  # SIGTERM to the whole group of processes ends the workers at once
                save_rest()
                raise
            meter.waited(time.perf_counter() - waiting)

            length = batch["tokens"].shape[-1]
            if length not in compiled:
                kind = f" for captions of {length} tokens" if compiled else ""
                progress.say(f"Compiling the training step{kind} …")
            calling = time.perf_counter()
            state, metrics = train_step(state, shard_batch(batch, setup.mesh))
            if length not in compiled:  # not a matter of throughput
                meter.discount(time.perf_counter() - calling)
                if not compiled:
                    progress.say(f"First step after {duration(time.perf_counter() - started)}.")
                compiled.add(length)
            meter.add(metrics)
            step += 1
            samples += config.batch_size
            profile.after(step, metrics)

            last = step == config.total_steps
            evaluates = bool(tasks) and (last or step % config.eval.every == 0)
            saves = last or step % config.checkpoint.every == 0 or (evaluates and best_metric)
            if not (evaluates or saves or interrupt.asked or step % config.log_every == 0):
                continue
            scalars = meter.report(step) | batches.metrics()
            progress.show(step, scalars)
            check_finite(scalars, step, workdir)
            found, evaluation = [], {}
            if evaluates:
                progress.end_line()  # the bars of an evaluation clear the line that they are on
                encoder.use(state.eval_params, state.model_state)
                found, failed = suite.run(tasks, encoder, lambda: interrupt.asked)
                evaluation = suite.logged(found)
                saves = saves or interrupt.asked  # with what has been scored
                for line in failed:
                    progress.say(f"Evaluation failed: {line}")
                if evaluation:
                    progress.say(f"Evaluation at step {step}:\n{table(evaluation)}")
                if best_metric and best_metric not in evaluation:
                    progress.say(
                        f"This evaluation has no config.checkpoint.best_metric={best_metric!r}: "
                        "its checkpoint will not be the best."
                    )
            writer.write(step, scalars | evaluation)
            if saves:
                digest_saved = checkpoints.save(state, samples, data, config, evaluation)
                saved = step
                if evaluates and is_first:
                    try:
                        suite.keep(workdir, step, digest_saved, found, absent)
                    except (ValueError, OSError) as error:
                        progress.say(f"The scores are in metrics.jsonl alone: {error}")
            meter.restart()
        save_rest()

    if step < config.total_steps:
        progress.say(f"Interrupted at step {step} and saved. The same command continues.")
    else:
        progress.say(
            f"Finished step {step} in {duration(time.perf_counter() - started)}: {workdir} holds "
            "checkpoints, metrics.jsonl and TensorBoard events."
        )
    return state


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
        "table": f"{workdir / PARAMETERS} lists the parameters",
    }
    return "\n".join(f"  {name:<11} {text}" for name, text in rows.items())


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


class Profile:
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

    def after(self, step: int, metrics) -> None:
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def check_config(config, setup: Setup) -> None:
    """Raises ValueError, naming the field, for what no module that is built later would refuse."""
    mesh = setup.mesh
    for name in ("batch_size", "eval.batch_size"):
        check_batch_size(f"config.{name}", config[name], mesh)
    at_least = dict.fromkeys(("total_steps", "log_every", "checkpoint.every", "checkpoint.keep"), 1)
    at_least["microbatches"] = 1
    at_least |= {
        "data.threads": 0,
        "data.workers": 0,
        "data.prefetch": 2,
        "data.bad_window": 1,
        "loss.max_scale": 0,
        "eval.every": 0,
        "seed": 0,
    }
    for name, least in at_least.items():
        if config[name] < least:
            raise ValueError(f"config.{name}={config[name]} must be at least {least}.")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"config.ema_decay={config.ema_decay} must lie in 0 … 1 (0: no average).")
    part = config.batch_size // config.microbatches
    if part * config.microbatches != config.batch_size or part % mesh.size:
        raise ValueError(
            f"config.microbatches={config.microbatches} does not cut config.batch_size="
            f"{config.batch_size} into equal parts that can be divided over {mesh.size} devices."
        )
    if part < 2 and "batch_stats" in setup.abstract_state.model_state:
        raise ValueError(
            f"config.batch_size={config.batch_size} in config.microbatches={config.microbatches} "
            "leaves one example for batch normalization, which needs at least two."
        )
    if not 0 < config.loss.mlm_capacity <= 1:
        raise ValueError(
            f"config.loss.mlm_capacity={config.loss.mlm_capacity} must lie in 0 … 1, above 0."
        )
    limits, largest = config.loss.logit_scale_range, math.log(float(jnp.finfo(jnp.float32).max))
    if limits[1] > largest:
        raise ValueError(
            f"config.loss.logit_scale_range={tuple(limits)}: the upper limit must be below "
            f"{largest:.1f}, above which its exponential is no float32 any more; published recipes "
            "have (3.0, 6.0)."
        )
    for name in setup.method.views.image:
        augment.check_view(name, config.views[name])
    seen, trained = preprocess(config), (config.image_mean, config.image_std)
    if config.eval.every and (tuple(seen.mean), tuple(seen.std)) != tuple(map(tuple, trained)):
        raise ValueError(
            f"config.eval.preprocess={config.eval.preprocess!r} normalizes images otherwise than "
            f"config.image_mean={tuple(config.image_mean)} and image_std="
            f"{tuple(config.image_std)}, with which the run trains: choose 'train'."
        )
    steps = config.profile.steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= config.total_steps):
        raise ValueError(
            f"config.profile.steps={tuple(steps)} must be (first, last) with 1 <= first <= last "
            f"<= config.total_steps={config.total_steps}, or () for no profile."
        )
    text = config.model.text
    if text.vocab_size < VOCAB_SIZE or text.eot_id != EOT:
        raise ValueError(
            f"config.model.text.vocab_size={text.vocab_size} and eot_id={text.eot_id} do not fit "
            f"the tokenizer: at least {VOCAB_SIZE} ids, of which {EOT} ends a text."
        )
    groups = config.model.image.bn_group_size if config.model.image.kind == "resnet" else 0
    if groups and part % groups:
        raise ValueError(
            f"config.batch_size={config.batch_size} in config.microbatches={config.microbatches} "
            f"gives parts that are not a multiple of config.model.image.bn_group_size={groups}."
        )


def check_best_metric(name: str, tasks: list) -> None:
    """Raises ValueError unless `name` is empty or a metric that `tasks` compute."""
    known = [f"val/{task.name}/{metric}" for task in tasks for metric in task.metrics]
    if name and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"config.checkpoint.best_metric={name!r} is not computed during training; "
            + (f"did you mean {close[0]!r}? " if close else "")
            + f"The evaluations of this run give {known or 'nothing (config.eval.every is 0)'}."
        )


def check_same_model(saved: dict[str, Any], config, workdir: Path, progress: Progress) -> None:
    """Raises CheckpointError if the saved run is of another model; tells of other changes."""
    model, other = config_differences(saved, config)
    if model:
        raise CheckpointError(
            f"{workdir} holds a run of another model (saved -> now):\n  "
            + "\n  ".join(model)
            + "\nUse its configuration, or another workdir."
        )
    if other:
        progress.say("Continuing with changed settings (saved -> now):\n  " + "\n  ".join(other))


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


def check_workdir(workdir: Path) -> None:
    """Raises ValueError, before anything is computed, if `workdir` surely cannot be created."""
    there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise _unwritable(workdir, f"{there} is no folder to write in")


def prepare_workdir(workdir: Path) -> None:
    """Creates `workdir`. Raises ValueError if it cannot be written to."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise _unwritable(workdir, error.strerror) from error


def _unwritable(workdir: Path, why: str) -> ValueError:
    return ValueError(f"--workdir={workdir} cannot be written to ({why}): choose another folder.")
