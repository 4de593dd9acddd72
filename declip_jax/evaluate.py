"""Evaluate a trained model.

  python -m declip_jax.evaluate --workdir runs/mine
  python -m declip_jax.evaluate --workdir runs/mine --suite declip --data-dir data
  python -m declip_jax.evaluate --workdir runs/mine --task retrieval --data data/mine --split test
  python -m declip_jax.evaluate --init ViT-B-32.pt --suite declip --data-dir data

The model is the newest checkpoint of the workdir (or --step N, or --step best), its moving average
if it has one. A suite scores many sets: declip, alip, retrieval, all, or a Python file with
get_suite(); without a suite or a task, what config.eval of the run names is scored. What has been
scored before, during training or here, of the same checkpoint with the same settings and data, is
not scored again. Scores go to WORKDIR/evaluations/step_N.json and .csv; after a --task alone, the
last line printed is one JSON object.

--init scores weights of another program instead: open_clip, Transformers, OpenAI, DeCLIP or ALIP.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from declip_jax import initial
from declip_jax.checkpoint import Checkpoints, digest_of, to_json
from declip_jax.encode import Encoder
from declip_jax.evals import sets, suite, suites
from declip_jax.evals.cache import Cache
from declip_jax.evals.results import Results
from declip_jax.interop.architecture import config_of
from declip_jax.interop.pretrained import FORMATS
from declip_jax.interop.transfer import resized
from declip_jax.methods.base import encoders
from declip_jax.metrics import duration, silence_alarms, table
from declip_jax.parallel.mesh import make_mesh, replicated
from declip_jax.state import TrainState
from declip_jax.step import Setup

IMPORTED = "imported.json"


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      config: of its run, with the mesh of this machine.
      encoder: in use of the model.
      step: of the checkpoint.
      digest: of its arrays.
      record: of the checkpoint: samples seen, the configuration of the training, …
      setup, state: what the checkpoint was restored into. Of another program's weights there is no
        setup, and the state has their variables alone.
    """

    config: ConfigDict
    encoder: Encoder
    step: int
    digest: str
    record: dict[str, Any]
    setup: Setup | None
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
    checkpoints = Checkpoints.of_run(workdir)
    chosen = checkpoints.find(step)
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
    sizes = {n: config[n] for n in ("eval.batch_size", "loss.support_set.size")}
    setup = Setup(config, _devices(sizes))
    state = checkpoints.restore(chosen, setup.abstract_state)
    checkpoints.close()
    encoder = Encoder(setup.method, config, setup.mesh).use(state.eval_params, state.model_state)
    return Trained(config, encoder, chosen, digest_of(record), record, setup, state)


def _devices(sizes: dict[str, int]) -> list[jax.Device]:
    """As many devices as share the work evenly.

    Args:
      sizes: that their number must divide, by the field of the config.
    """
    shares = math.gcd(*sizes.values())
    count = max(n for n in range(1, jax.device_count() + 1) if shares % n == 0)
    if count < jax.device_count():
        print(
            f"Using {count} of {jax.device_count()} devices: more do not divide "
            + " and ".join(f"config.{name}={size}" for name, size in sizes.items())
            + ".",
            file=sys.stderr,
        )
    return jax.devices()[:count]


class Imported(NamedTuple):
    """What of another program was evaluated in a workdir, as `WORKDIR/imported.json` keeps it.

    Attributes:
      path: of the weights, or of a folder with them.
      format: one of `interop.pretrained.FORMATS`; "": told by the names.
      image_size, context: to fit the positions to; 0: the model's.
      preprocess: in place of what goes with the weights.
      digest: of the model, "" before it was read.
    """

    path: str
    format: str = ""
    image_size: int = 0
    context: int = 0
    preprocess: str = ""
    digest: str = ""

    @classmethod
    def of(cls, workdir: Path) -> "Imported":
        """What was evaluated in a workdir. Raises ValueError if its file is damaged."""
        file = workdir / IMPORTED
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is not what evaluate writes ({error}).") from error

    def keep(self, workdir: Path) -> None:
        """Writes it down. Raises ValueError if the workdir has scores of another model."""
        file = workdir / IMPORTED
        if (workdir / "checkpoints").is_dir():
            raise ValueError(f"--workdir={workdir} is a run's: give --init one of its own.")
        if file.exists() and (before := Imported.of(workdir)).digest != self.digest:
            raise ValueError(
                f"--workdir={workdir} has scores of another model ({before.path}, or what it was "
                "then): give --init one of its own."
            )
        workdir.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(self._asdict(), indent=1) + "\n", encoding="utf-8")
        os.replace(part, file)


def load_imported(imported: Imported) -> Trained:
    """Loads weights of another program.

    Raises:
      ValueError: what `initial.read` refuses, a model whose activation function is not known, or
        one that has changed since `imported` was written.
    """
    model = initial.complete(initial.read(imported.path, imported.format))
    print(f"{model.describe()}.", file=sys.stderr)
    resolution = imported.image_size or model.model["image"]["resolution"]
    context = imported.context or model.model["text"]["context"]
    model, notes = resized(model, resolution, context)
    protocol = imported.preprocess or initial.protocol(model)
    for note in (*model.notes, *notes, f"preprocessing: {protocol!r}"):
        print(f"  {note}", file=sys.stderr)
    digest = model.digest()
    if imported.digest not in ("", digest):
        raise ValueError(f"{imported.path} has changed since it was evaluated.")
    config = ConfigDict(
        dict(
            method=model.method,
            model=config_of(model.model),
            image_mean=model.mean,
            image_std=model.std,
            data=dict(source="", mixture=()),
            loss=dict(weights={}),
            eval=dict(
                batch_size=256,
                preprocess=protocol,
                short_side=model.short_side,
                data_dir="data",
                zeroshot=dict(source="", split="test", templates=("a photo of a {}.",)),
                retrieval=dict(source="", split="test", prefix=""),
            ),
        )
    )
    mesh = make_mesh(-1, 1, _devices({"eval.batch_size": config.eval.batch_size}))
    model_state = jax.device_put(dict(model.variables), replicated(mesh))
    params = model_state.pop("params")
    encoder = Encoder(encoders(config), config, mesh).use(params, model_state)
    state = TrainState(
        step=0, params=params, opt_state=None, model_state=model_state, ema=None, rng=None
    )
    told = ("method", "model", "image_mean", "image_std")  # the rest is how it is evaluated here
    record = {"samples": 0, "config": json.loads(to_json(ConfigDict({n: config[n] for n in told})))}
    return Trained(config, encoder, 0, digest, record, None, state)


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
        identity = results.identity(task.identity())
        result = None if again else results.find(identity)
        known = result is not None
        if not known:
            try:
                result = suite.score(task, trained.encoder, cache) | {"id": identity}
            except (ValueError, OSError) as error:
                if len(entries) == 1:
                    raise
                failed.append(f"{task.name}: {error}")
                continue
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
    parser.add_argument(
        "--workdir",
        type=Path,
        help="folder of a training run; with --init: where "
        "scores go (default: runs/ and the name of the weights)",
    )
    parser.add_argument("--init", help="weights of another program: a file, or a folder with one")
    parser.add_argument(
        "--init-format", choices=FORMATS, help="init: whose, where the names do not tell"
    )
    parser.add_argument("--image-size", type=int, help="init: pixels, to fit the positions to")
    parser.add_argument("--context", type=int, help="init: tokens, to fit the positions to")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--suite",
        help=f"{', '.join(suites.SUITES)}, or a .py file; default: as in training",
    )
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
    if not args.task and (given := [name for name in one if getattr(args, name) is not None]):
        parser.error(f"--{given[0]} is for --task")
    if args.task and not (args.set or args.data):
        parser.error("--task needs --set or --data")
    if args.task != "zeroshot" and (args.classes or args.templates):
        parser.error("--classes and --template are for --task zeroshot")
    if args.task != "retrieval" and args.prefix is not None:
        parser.error("--prefix is for --task retrieval")
    if not (args.workdir or args.init):
        parser.error("--workdir or --init is needed")
    if args.init and not (args.suite or args.task):
        parser.error("--init needs --suite or --task")
    of_init = ("init_format", "image_size", "context")
    if not args.init and (given := [n for n in of_init if getattr(args, n) is not None]):
        parser.error(f"--{given[0].replace('_', '-')} is for --init")
    if args.init and args.step != "newest":
        parser.error("--step is for a run's --workdir")
    print(f"Loading {args.init or args.workdir} …", file=sys.stderr, flush=True)
    try:
        silence_alarms()
        if args.init:
            args.workdir = args.workdir or Path("runs") / initial.name_of(Path(args.init))
            imported = Imported(
                str(Path(args.init).absolute()),
                args.init_format or "",
                args.image_size or 0,
                args.context or 0,
                args.preprocess or "",
            )
            trained = load_imported(imported)
            imported._replace(digest=trained.digest).keep(args.workdir)
        else:
            trained = load(args.workdir, args.step, args.preprocess)
        if args.data_dir:
            trained.config.eval.data_dir = args.data_dir
        if args.suite:
            entries = suites.load(args.suite)
        elif args.task:
            entries = [_entry(args, trained.config)]
        elif not (entries := suite.entries_of(trained.config)):
            raise ValueError(
                f"config.eval of {args.workdir} names nothing to score (zeroshot.source, "
                "retrieval.source, suite): say what by --suite or --task."
            )
        results, failed = evaluate(trained, args.workdir, entries, again=args.again)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    where = args.init or f"{args.workdir} at step {trained.step}"
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
    if results and not args.task:
        print(f"All metrics: {args.workdir / 'evaluations'}/step_{trained.step}.json and .csv")
        print(f"A page of them: python -m declip_jax.report {shlex.quote(str(args.workdir))}")
    if failed:
        sys.exit("error: " + "\nerror: ".join(failed))
    if not results:
        sys.exit(
            "error: nothing was scored: no set of the suite is in "
            f"--data-dir={trained.config.eval.data_dir}; name the folder that has them."
        )


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
