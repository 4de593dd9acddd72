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
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip_jax.evals import sets, suites
from declip_jax.flags import Parser, mistakes_in_a_line
from declip_jax.interop.formats import FORMATS

if TYPE_CHECKING:
    from declip_jax.trained import Trained

TASKS = tuple(dict.fromkeys(entry["task"] for entry in suites.SUITES["all"]))  # it has each
OF_A_TASK = ("set", "data", "split", "classes", "template", "prefix")
OF_INIT = ("init_format", "image_size", "context")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m declip_jax.evaluate"):
    args = parse(arguments, prog)
    print(f"Loading {args.init or args.workdir} …", file=sys.stderr, flush=True)
    with mistakes_in_a_line():
        # After the flags: --help need not wait for JAX.
        from declip_jax.metrics import silence_alarms
        from declip_jax.scoring import score

        silence_alarms()
        trained = load(args)
        entries, data_dir = entries_of(args, trained), args.data_dir or trained.eval.data_dir
        scored = trained, args.workdir, entries
        results, failed = score(*scored, data_dir=data_dir, again=args.again)
    tell(args, trained.step, results)
    if failed:
        sys.exit("error: " + "\nerror: ".join(failed))
    if not results:
        sys.exit(
            f"error: nothing was scored: no set of the suite is in --data-dir={data_dir}; name the "
            "folder that has them."
        )


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    scores = "with --init: where scores go (default: runs/ and the name of the weights)"
    add("--workdir", type=Path, help=f"folder of a training run; {scores}")
    add("--init", help="weights of another program: a file, or a folder with one")
    add("--init-format", choices=FORMATS, help="init: whose, where the names do not tell")
    add("--image-size", type=int, help="init: pixels, to fit the positions to")
    add("--context", type=int, help="init: tokens, to fit the positions to")
    what = parser.add_mutually_exclusive_group()
    known = ", ".join(suites.SUITES)
    what.add_argument("--suite", help=f"{known}, or a .py file; default: as in training")
    what.add_argument("--task", choices=TASKS, help="of one set alone")
    add("--set", help=f"task: of {', '.join((*sets.NAMES, *sets.RETRIEVAL))}")
    add("--data", help="task: the data, such as a folder that `prepare` wrote, or 'scenes'")
    add("--data-dir", help="where known sets are; default: the run's")
    add("--split", help="task: to score; default: the run's, or 'test'")
    add("--step", default="newest", help="a number, 'best', or 'newest' (default)")
    add("--preprocess", choices=("declip", "openai", "train"), help="default: the run's")
    add("--classes", help="zeroshot: file of readable class names, one a line, by label")
    prompt = "zeroshot: prompt such as 'a photo of a {}.'; may be given several times"
    add("--template", action="append", help=prompt)
    add("--prefix", help="retrieval: put before captions, as 'a photo of '")
    add("--again", action="store_true", help="also what is known from before")
    args = parser.parse_args(arguments)
    given = {name for name, value in vars(args).items() if value is not None}
    for names, flag in ((OF_A_TASK, "task"), (OF_INIT, "init")):
        if flag not in given and (alone := [name for name in names if name in given]):
            parser.error(f"--{alone[0].replace('_', '-')} is for --{flag}")
    if args.task and not (args.set or args.data):
        parser.error("--task needs --set or --data")
    if args.task != "zeroshot" and (args.classes or args.template):
        parser.error("--classes and --template are for --task zeroshot")
    if args.task != "retrieval" and args.prefix is not None:
        parser.error("--prefix is for --task retrieval")
    if not (args.workdir or args.init):
        parser.error("--workdir or --init is needed")
    if args.init and not (args.suite or args.task):
        parser.error("--init needs --suite or --task")
    if args.init and args.step != "newest":
        parser.error("--step is for a run's --workdir")
    return args


def load(args: argparse.Namespace) -> "Trained":
    """The model that the command line names; sets the workdir where it does not."""
    from declip_jax import trained

    if not args.init:
        return trained.load(args.workdir, args.step, args.preprocess)
    args.workdir = args.workdir or Path("runs") / trained.name_of(Path(args.init))
    sizes = args.image_size or 0, args.context or 0
    given = args.init_format or "", *sizes, args.preprocess or ""
    imported = trained.Imported(str(Path(args.init).absolute()), *given)
    model = trained.load_imported(imported)
    imported._replace(digest=model.digest).keep(args.workdir)
    return model


def entries_of(args: argparse.Namespace, trained: "Trained") -> list[dict[str, Any]]:
    """The entries of a suite that the command line asks for."""
    if args.suite:
        return suites.load(args.suite)
    if args.task:
        entry = dict(task=args.task, set=args.set, source=args.data)
        entry |= dict(templates=args.template, classes=args.classes, prefix=args.prefix)
        if args.task in ("zeroshot", "retrieval"):
            usual = None if args.set else getattr(trained.eval, args.task).split
            entry["split"] = args.split or usual
        elif args.split:
            entry["test"] = args.split
        return [{name: value for name, value in entry.items() if value is not None}]
    from declip_jax.evals import suite

    if not (entries := suite.entries_of(trained.eval)):
        raise ValueError(
            f"config.eval of {args.workdir} names nothing to score (zeroshot.source, "
            "retrieval.source, suite): say what by --suite or --task."
        )
    return entries


def tell(args: argparse.Namespace, step: int, results: list[dict[str, Any]]) -> None:
    """Prints what was found."""
    from declip_jax.metrics import table

    where = args.init or f"{args.workdir} at step {step}"
    if args.task and results:
        (result,) = results
        described = {name: result[name] for name in ("task", "set")} | result["settings"]
        described |= dict(workdir=str(args.workdir), step=step)
        print(f"{args.task} on {result['title']}, {where}:\n{table(result['metrics'])}")
        print(json.dumps(described | result["metrics"]))
    elif results:
        print(f"{where}, by the metric that papers report:")
        rows = {f"{r['title']}, {r['task']}, {r['metric']}": r for r in results}
        print(table({name: r["metrics"][r["metric"]] for name, r in rows.items()}))
        print(f"All metrics: {args.workdir / 'evaluations'}/step_{step}.json and .csv")
        print(f"A page of them: python -m declip_jax.report {shlex.quote(str(args.workdir))}")


if __name__ == "__main__":
    main()
