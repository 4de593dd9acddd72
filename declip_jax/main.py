"""Train a model.

  python -m declip_jax.main --config configs/quickstart.py --workdir runs/quickstart

Any field of the configuration can be set: --config.optim.peak_lr=5e-4. Started again with the
same workdir, a run continues where it stopped.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/quickstart.py or configs/quickstart.py:tiny."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and logs of this run."
)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake ends in a line that names it, not in a trace."""
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value.method  # a missing file is reported at the first use
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        while error.args and isinstance(error.args[0], Exception):  # an unknown field's is wrapped
            error = error.args[0]
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        if isinstance(error, KeyError) and " " not in message:  # no field is like it
            message = f"the configuration has no field {message.strip(chr(39))!r}"
        # What a configuration file raised stands at the end of a quoted trace.
        sys.exit(f"error: {message.strip().splitlines()[-1].strip()}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: fields are set as --config.a.b=c")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    print(f"Training {file} in {_WORKDIR.value}: starting JAX …", flush=True)
    from declip_jax.train import train  # after the flags: --help need not wait for JAX

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file at INFO
    try:
        train(_CONFIG.value, Path(_WORKDIR.value))
    except KeyboardInterrupt:
        sys.exit("Stopped without saving.")
    except (ValueError, FloatingPointError, OSError) as error:
        logging.debug("where it was raised", exc_info=True)
        sys.exit(f"error: {error}\n(--verbosity=1 shows where it was raised)")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
