"""Evaluate a trained model.

  python -m declip_jax.evaluate --workdir runs/mine --suite declip --data-dir data
  python -m declip_jax.evaluate --workdir runs/mine --task retrieval --data data/mine --split test

The model is the newest checkpoint of the workdir (or --step N, or --step best), its moving average
if it has one. A suite scores many sets: declip, alip, retrieval, all, or a Python file with
get_suite(). What has been scored before, of the same checkpoint with the same settings and data, is
not scored again. Scores go to WORKDIR/evaluations/step_N.json and .csv; after a --task alone, the
last line printed is one JSON object.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from declip_jax.checkpoint import Checkpoints
from declip_jax.encode import Encoder
from declip_jax.evals import sets, suite, suites
from declip_jax.evals.cache import Cache
from declip_jax.evals.results import Results
from declip_jax.metrics import duration, table
from declip_jax.state import TrainState
from declip_jax.train import Setup


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      config: of its run, with the mesh of this machine.
      encoder: in use of the model.
      step: of the checkpoint.
      digest: of its arrays.
      record: of the checkpoint: samples seen, the configuration of the training, …
      setup, state: what the checkpoint was restored into.
    """

    config: ConfigDict
    encoder: Encoder
    step: int
    digest: str
    record: dict[str, Any]
    setup: Setup
    state: TrainState


def load(workdir: Path, step: str = "newest", preprocess: str | None = None) -> Trained:
    """Loads a trained model.

    Args:
      workdir: of a run.
      step: of the checkpoint: a number, "newest" or "best" (by the run's own best metric).
      preprocess: in place of the run's `config.eval.preprocess`.

    Raises:
      ValueError: no workdir, no checkpoint, or none of that step.
    """
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} holds no checkpoints: train there first.")
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{workdir} holds no complete checkpoint yet.")
    if step == "newest":
        chosen = steps[-1]
    elif step == "best":
        metric = checkpoints.record(steps[-1])["config"]["checkpoint"]["best_metric"]
        chosen = checkpoints.best(metric)
    else:
        chosen = int(step) if step.isdecimal() else None
    if chosen not in steps:
        raise ValueError(
            f"--step={step} is not a checkpoint of {workdir}: expected one of {steps}, 'newest', "
            "or 'best' if the run had a config.checkpoint.best_metric."
        )
    record = checkpoints.record(chosen)
    config = ConfigDict(record["config"])
    # This machine's devices, not those of the training: as many as share its work evenly.
    config.mesh = dict(data=-1, fsdp=1)
    config.model.attention = "xla"
    if preprocess:
        config.eval.preprocess = preprocess
    elif "preprocess" not in config.eval:
        raise ValueError(
            f"{workdir} is of a version without config.eval.preprocess: say which --preprocess."
        )
    shares = math.gcd(config.eval.batch_size, config.loss.support_set.size)
    count = max(n for n in range(1, jax.device_count() + 1) if shares % n == 0)
    if count < jax.device_count():
        print(
            f"Using {count} of {jax.device_count()} devices: more do not divide "
            f"config.eval.batch_size={config.eval.batch_size} and "
            f"config.loss.support_set.size={config.loss.support_set.size}.",
            file=sys.stderr,
        )
    setup = Setup(config, jax.devices()[:count])
    state = checkpoints.restore(chosen, setup.abstract_state)
    checkpoints.close()
    encoder = Encoder(setup.method, config, setup.mesh).use(state.eval_params, state.extra)
    fingerprint = json.dumps(record["fingerprint"], sort_keys=True).encode()
    digest = hashlib.blake2b(fingerprint, digest_size=16).hexdigest()
    return Trained(config, encoder, chosen, digest, record, setup, state)


def evaluate(
    trained: Trained, workdir: Path, entries: list[dict[str, Any]], *, again: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Scores what has not been scored yet, and writes it down.

    Args:
      trained: of `load`.
      workdir: of its run.
      entries: of a suite.
      again: compute everything, also what has been scored or is in the cache.

    Returns:
      The results of these entries, as `Results` keeps them; and a line for each that failed.
    """
    results = Results(workdir, trained.step, trained.digest)
    common = suite.shared(trained.config)
    tasks, absent, failed = [], [], []
    for entry in entries:  # mistakes show before the long work
        try:
            tasks.append(suite.task_of(entry, common))
        except sets.Absent as error:
            if len(entries) == 1:
                raise
            absent.append(dict(set=entry["set"], task=entry["task"], why=str(error)))
        except ValueError as error:
            if len(entries) == 1:
                raise
            failed.append(
                f"{entry.get('task')} on {entry.get('set') or entry.get('source')}: {error}"
            )
    if absent:
        results.set_absent(absent)
        names = list(dict.fromkeys(one["set"] for one in absent))
        print(
            f"Not on this machine: {', '.join(names)}. {results.path} says where each was looked "
            "for.",
            file=sys.stderr,
        )
    cache = Cache(None if again else workdir / "evaluations" / "cache", trained.digest)
    found, started = [], time.perf_counter()
    for number, task in enumerate(tasks, 1):
        identity = json.dumps([trained.digest, task.identity()], sort_keys=True).encode()
        identity = hashlib.blake2b(identity, digest_size=16).hexdigest()
        result = None if again else results.find(identity)
        known = result is not None
        if not known:
            start = time.perf_counter()
            try:
                metrics, classes = task(trained.encoder, cache)
            except (ValueError, OSError) as error:
                if len(entries) == 1:
                    raise
                failed.append(f"{task.name}: {error}")
                continue
            title, images = task.title, metrics["images"]
            if task.images_of_set not in (0, images):
                title += f" ({images:,} of {task.images_of_set:,} images)"
            result = {
                "set": task.set,
                "title": title,
                "task": task.task,
                # Few-shot classification leaves out what classes are too small for.
                "metric": next(m for m in (task.metric, *task.metrics[::-1]) if m in metrics),
                "metrics": metrics,
                "settings": json.loads(json.dumps(task.settings)),
                "classes": classes,
                "seconds": round(time.perf_counter() - start, 3),
                "id": identity,
            }
            results.add(result)
        found.append(result)
        left = (time.perf_counter() - started) / number * (len(tasks) - number)
        print(
            f"[{number}/{len(tasks)}] {task.name}: {result['metric']} "
            f"{100 * result['metrics'][result['metric']]:.2f} %, "
            + ("scored before" if known else f"{result['seconds']:.1f} s")
            + (f", about {duration(left)} left" if number < len(tasks) else ""),
            file=sys.stderr,
        )
    return found, failed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m declip_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a training run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", help=f"{', '.join(suites.SUITES)}, or a .py file")
    what.add_argument("--task", choices=tuple(suite.TASKS), help="of one set alone")
    parser.add_argument("--set", help=f"task: of {', '.join((*sets.NAMES, *sets.RETRIEVAL))}")
    parser.add_argument(
        "--data", help="task: the data, such as a folder that `prepare` wrote, or 'scenes'"
    )
    parser.add_argument("--data-dir", help="where known sets are; default: the run's")
    parser.add_argument("--split", help="task: to score; default: the run's, or 'test'")
    parser.add_argument("--step", default="newest", help="a number, 'best', or 'newest' (default)")
    parser.add_argument(
        "--preprocess", choices=("declip", "openai", "train"), help="default: the run's"
    )
    parser.add_argument(
        "--classes", help="zeroshot: file of readable class names, one a line, by label"
    )
    parser.add_argument(
        "--template",
        action="append",
        dest="templates",
        help="zeroshot: prompt such as 'a photo of a {}.'; may be given several times",
    )
    parser.add_argument("--prefix", help="retrieval: put before captions, as 'a photo of '")
    parser.add_argument("--again", action="store_true", help="also what is known from before")
    args = parser.parse_args()
    one = {"set", "data", "split", "classes", "templates", "prefix"}
    if args.suite and (given := [name for name in one if getattr(args, name) is not None]):
        parser.error(f"--{given[0]} is for --task")
    if args.task and not (args.set or args.data):
        parser.error("--task needs --set or --data")
    if args.task != "zeroshot" and (args.classes or args.templates):
        parser.error("--classes and --template are for --task zeroshot")
    if args.task != "retrieval" and args.prefix is not None:
        parser.error("--prefix is for --task retrieval")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it will only read
    try:
        trained = load(args.workdir, args.step, args.preprocess)
        if args.data_dir:
            trained.config.eval.data_dir = args.data_dir
        if args.suite:
            entries = suites.load(args.suite)
        else:
            entries = [_entry(args, trained.config)]
        results, failed = evaluate(trained, args.workdir, entries, again=args.again)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    where = f"{args.workdir} at step {trained.step}"
    if args.task and results:
        (result,) = results
        described = {name: result[name] for name in ("task", "set")} | result["settings"]
        described |= dict(workdir=str(args.workdir), step=trained.step)
        print(f"{args.task} on {result['title']}, {where}:\n{table(result['metrics'])}")
        print(json.dumps(described | result["metrics"]))
    elif results:
        print(f"{where}, by the metric that papers report:")
        rows = {f"{r['title']}, {r['task']}, {r['metric']}": r for r in results}
        print(table({name: r["metrics"][r["metric"]] for name, r in rows.items()}))
    if args.suite and results:
        print(f"All metrics: {args.workdir / 'evaluations'}/step_{trained.step}.json and .csv")
        print(f"A page of them: python -m declip_jax.report {args.workdir}")
    if failed:
        sys.exit("error: " + "\nerror: ".join(failed))
    if not results:
        sys.exit("error: nothing was scored: the data of no set are there; see above.")


def _entry(args: argparse.Namespace, config) -> dict[str, Any]:
    """The one that the command line describes."""
    entry = dict(task=args.task, set=args.set, source=args.data)
    entry |= dict(templates=args.templates, classes=args.classes, prefix=args.prefix)
    if args.task in ("zeroshot", "retrieval"):
        entry["split"] = args.split or (None if args.set else config.eval[args.task].split)
    elif args.split:
        entry["test"] = args.split
    return {name: value for name, value in entry.items() if value is not None}


if __name__ == "__main__":
    main()
