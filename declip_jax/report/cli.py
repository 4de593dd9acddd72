"""The command line of the report."""

import argparse
import os
import sys
from pathlib import Path

from declip_jax.metrics import silence_alarms, table
from declip_jax.report.page import write_page
from declip_jax.report.runs import load_runs

_DESCRIPTION = """Show runs on one HTML page, which needs no network.

  python -m declip_jax.report runs/mine runs/other --out report.html

The page has their curves, their scores beside published ones, what they confuse, and what captions
find: images, and rows of the support set. Scores are those that training and declip_jax.evaluate
have written.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m declip_jax.report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=Path, nargs="+", help="folder of a training run")
    parser.add_argument("--out", type=Path, help="default: report.html in the first workdir")
    parser.add_argument("--images", type=int, default=256, help="how many to search (256)")
    parser.add_argument("--captions", type=int, default=12, help="how many to show (12)")
    args = parser.parse_args()
    for name in ("images", "captions"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    out = args.out or args.workdir[0] / "report.html"
    print(f"Reading {', '.join(map(str, args.workdir))} …", flush=True)
    try:
        silence_alarms()
        runs = load_runs(args.workdir)
        print("Searching images and neighbors, drawing …", flush=True)
        write_page(runs, out, images=args.images, captions=args.captions)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for run in runs:
        step, evaluation = run.last_evaluation()
        if evaluation:
            print(f"{run.workdir}, evaluated during training at step {step}:")
            print(table(evaluation))
    print(f"Report: {out} ({os.path.getsize(out) / 1e6:.1f} MB)")
