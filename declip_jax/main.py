"""Train a model.

  python -m declip_jax.main --config configs/quickstart.py --workdir runs/quickstart

Any field of the configuration can be set: --config.optim.peak_lr=5e-4. Started again with the
same workdir, a run continues where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from declip_jax.flags import Parser, mistakes_in_a_line


def main(arguments: Sequence[str] | None = None, prog: str = "python -m declip_jax.main"):
    parser = Parser(prog, __doc__, config=True)
    add = parser.add_argument
    folder = "folder for checkpoints, metrics and logs of this run"
    add("--workdir", type=Path, required=True, help=folder)
    logs = "which logs of libraries are shown: 1 for all, -1 for warnings (default)"
    add("-v", "--verbosity", type=int, default=logging.WARNING, help=logs)
    args = parser.parse_args(arguments)
    print(f"Training {args.config_file} in {args.workdir}: starting JAX …", flush=True)
    from declip_jax.train import train  # after the flags: --help need not wait for JAX

    flags.FLAGS.mark_as_parsed()  # else absl warns of each library that logs
    logging.use_absl_handler()
    logging.set_verbosity(args.verbosity)
    hint = "\n(--verbosity=1 shows where it was raised)"
    with mistakes_in_a_line("Stopped without saving.", hint):
        train(args.config, args.workdir)


if __name__ == "__main__":
    main()
