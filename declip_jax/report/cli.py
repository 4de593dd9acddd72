"""Show runs on one HTML page, which needs no network.

  python -m declip_jax.report runs/mine runs/other --out report.html

The page has their curves, their scores beside published ones, what they confuse, and what captions
find: images, and rows of the support set. Scores are those that training and declip_jax.evaluate
have written.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from declip_jax.flags import Parser, at_least, mistakes_in_a_line


def main(arguments: Sequence[str] | None = None, prog: str = "python -m declip_jax.report"):
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    add("workdir", type=Path, nargs="+", help="folder of a training run")
    add("--out", type=Path, help="default: report.html in the first workdir")
    add("--images", type=at_least(1), default=256, help="how many to search (256)")
    add("--captions", type=at_least(1), default=12, help="how many to show (12)")
    args = parser.parse_args(arguments)
    out = args.out or args.workdir[0] / "report.html"
    print(f"Reading {', '.join(map(str, args.workdir))} …", flush=True)
    with mistakes_in_a_line():
        # After the flags: --help need not wait for JAX.
        from declip_jax.metrics import silence_alarms, table
        from declip_jax.report.page import write_page
        from declip_jax.report.runs import load_runs

        silence_alarms()
        runs = load_runs(args.workdir)
        print("Searching images and neighbors, drawing …", flush=True)
        write_page(runs, out, images=args.images, captions=args.captions)
    for run in runs:
        step, evaluation = run.last_evaluation()
        if evaluation:
            print(f"{run.workdir}, evaluated during training at step {step}:")
            print(table(evaluation))
    print(f"Report: {out} ({os.path.getsize(out) / 1e6:.1f} MB)")
