"""Evaluate a trained model.

  python -m declip_jax.evaluate --workdir runs/quickstart --task zeroshot --data scenes
  python -m declip_jax.evaluate --workdir runs/mine --task retrieval --data data/mine --split test

The model is the newest checkpoint of the workdir (or --step N, or --step best), its moving average
if it has one.
Prints a table and, as the last line, one JSON object.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from declip_jax.checkpoint import Checkpoints
from declip_jax.encode import Encoder
from declip_jax.evals import suite
from declip_jax.metrics import table
from declip_jax.train import Setup


def load(workdir: Path, step: str = "newest"):
    """Loads a trained model.

    Args:
      workdir: of a run.
      step: of the checkpoint: a number, "newest" or "best" (by the run's own best metric).

    Returns:
      (config, encoder, step): the run's configuration, an `Encoder` in use of the model.

    Raises:
      ValueError: no workdir, no checkpoint, or none of that step.
    """
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"--workdir={workdir} holds no checkpoints: train there first.")
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"--workdir={workdir} holds no complete checkpoint yet.")
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
    config = ConfigDict(checkpoints.record(chosen)["config"])
    # This machine's devices, not those of the training: as many as share its work evenly.
    config.mesh = dict(data=-1, fsdp=1)
    config.model.attention = "xla"
    shares = math.gcd(config.eval.batch_size, config.loss.support_set.size)
    count = max(n for n in range(1, jax.device_count() + 1) if shares % n == 0)
    setup = Setup(config, jax.devices()[:count])
    state = checkpoints.restore(chosen, setup.abstract_state)
    checkpoints.close()
    encoder = Encoder(setup.method, config, setup.mesh).use(state.eval_params, state.extra)
    return config, encoder, chosen


def evaluate(args: argparse.Namespace) -> tuple[dict, dict[str, float]]:
    """Runs the task of the command line; returns what was evaluated, and its metrics."""
    config, encoder, step = load(args.workdir, args.step)
    settings = config.eval[args.task]
    settings.source = args.data
    settings.split = args.split or settings.split
    if args.templates:
        settings.templates = tuple(args.templates)
    if args.prefix is not None:
        settings.prefix = args.prefix
    reading = dict(
        resolution=config.model.image.resolution,
        resize=config.eval.resize,
        batch_size=config.eval.batch_size,
    )
    if args.classes:
        reading["classes"] = args.classes
    described = {
        "task": args.task,
        "data": args.data,
        "split": settings.split,
        "workdir": str(args.workdir),
        "step": step,
    }
    return described, suite.TASKS[args.task](settings, **reading)(encoder)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m declip_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--task", required=True, choices=("zeroshot", "retrieval"))
    parser.add_argument("--data", required=True, help="folder that `prepare` wrote, or 'scenes'")
    parser.add_argument("--split", help="default: the one in the run's configuration")
    parser.add_argument("--step", default="newest", help="a number, 'best', or 'newest' (default)")
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
    args = parser.parse_args()
    if args.task == "retrieval" and (args.classes or args.templates):
        parser.error("--classes and --template are for --task zeroshot")
    if args.task == "zeroshot" and args.prefix is not None:
        parser.error("--prefix is for --task retrieval")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it will only read
    try:
        described, metrics = evaluate(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("{task} on {data} ({split}), {workdir} at step {step}:".format(**described))
    print(table(metrics))
    print(json.dumps(described | metrics))


if __name__ == "__main__":
    main()
