"""The command `declip-jax`: all commands under one name."""

import importlib
import sys
from collections.abc import Sequence

from declip_jax.hints import did_you_mean

COMMANDS = {  # the module of each, and what it does
    "train": ("main", "train a model, or continue"),
    "evaluate": ("evaluate", "score a model on a suite or a set"),
    "report": ("report", "show runs on one HTML page"),
    "export": ("export", "write a model as files for PyTorch"),
    "prepare": ("prepare", "turn data of any format into checked shards"),
    "views": ("views", "draw what a run trains on"),
    "bench": ("bench", "measure how fast a run's input is"),
}


def main(arguments: Sequence[str] | None = None) -> int | None:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: declip-jax COMMAND ...\n\ncommands, each with a --help of its own:")
        print("\n".join(f"  {name:<10}{does}" for name, (_, does) in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        hint = f"{did_you_mean(name, COMMANDS)} There are {', '.join(COMMANDS)}."
        print(f"error: there is no command {name!r}.{hint}", file=sys.stderr)
        return 2
    sys.path.insert(0, "")  # as `python -m` does: configurations import one another
    command = importlib.import_module(f"declip_jax.{COMMANDS[name][0]}")
    return command.main(rest, prog=f"declip-jax {name}")
