"""What the command lines share: --config with its fields, and mistakes told in one line."""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from declip_jax.hints import did_you_mean
from declip_jax.versions import RENAMED, rename

_FIELD = r"(--?(?:no)?config\.)([^=]+)(=.*)?"


class Parser(argparse.ArgumentParser):
    """argparse's, which ends the process with one line for a mistake.

    Args:
      prog: what is typed to start the command.
      description: the docstring of its module.
      config: whether there is a --config, whose fields can be set. What is parsed then has
        `config`, a ConfigDict, and `config_file`, as it was given.
    """

    def __init__(
        self, prog: str, description: str | None = None, *, config: bool = False, **options: Any
    ):
        options |= dict(prog=prog, description=description)
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._config = config
        if config:
            self.add_argument(
                "--config",
                dest="config_file",
                required=True,
                metavar="FILE[:ARG]",
                help="such as configs/quickstart.py or configs/quickstart.py:tiny; any field of it "
                "can be set: --config.optim.peak_lr=5e-4",
            )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args, rest = self.parse_known_args(args, namespace)
        if self._config:
            try:
                args.config = read_config(args.config_file, rest)
            except ValueError as error:
                self.error(str(error))
        elif rest:
            self.error(f"unexpected arguments {rest}")
        return args

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        known = self._option_string_actions
        # Before what is missing, which it may be a misspelling of. Commands look at their own.
        for name in () if self._subparsers else (x.split("=")[0] for x in args if " " not in x):
            is_field = self._config and re.match(_FIELD, name)
            if name[:2] == "--" != name and not is_field:
                if not any(one.startswith(name) for one in known):
                    self.error(f"there is no flag {name}.{did_you_mean(name, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def read_config(file: str, fields: Sequence[str] = ()) -> ConfigDict:
    """The configuration of a file, with fields set as on a command line.

    Args:
      file: its path, and after a colon the argument of its get_config.
      fields: "--config.a.b=c", or the value by itself after it.

    Raises ValueError: with a line that names the mistake.
    """
    try:
        config, _ = _parse(config_flags.DEFINE_config_file, [f"--config={file}"])
        with config.unlocked():
            rename(config)  # before fields are set by either name
        config, rest = _parse(config_flags.DEFINE_config_dict, list(map(_renamed, fields)), config)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        while error.args and isinstance(error.args[0], Exception):  # an unknown field's is wrapped
            error = error.args[0]
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        if isinstance(error, KeyError) and " " not in message:  # no field is like it
            message = f"the configuration has no field {message.strip(chr(39))!r}"
        for old, new in RENAMED.items():  # a file that sets or reads a field by its old name
            if f'"{old.rpartition(".")[2]}"' in message:
                message = f"{file} uses config.{old}, which is called config.{new} now."
        # What a configuration file raised stands at the end of a quoted trace.
        raise ValueError(message.strip().splitlines()[-1].strip()) from error
    if rest:
        raise ValueError(f"unexpected arguments {rest}: fields are set as --config.a.b=c")
    return config


def _parse(define: Callable, arguments: list[str], *default: Any) -> tuple[ConfigDict, list[str]]:
    """The configuration that a flag of ml_collections gives, and the arguments that it left."""
    values = flags.FlagValues()  # of our own: FLAGS has those of all libraries
    arguments = ["", *arguments]
    config = define("config", *default, flag_values=values, sys_argv=arguments)
    rest = values(arguments)[1:]
    _ = config.value.method  # a missing file is reported at the first use
    return config.value, rest


def _renamed(argument: str) -> str:
    found = re.fullmatch(_FIELD, argument, re.DOTALL)
    if not found or found[2] not in RENAMED:
        return argument
    new = RENAMED[found[2]]
    print(f"config.{found[2]} is called config.{new} now.", file=sys.stderr)
    return f"{found[1]}{new}{found[3] or ''}"


@contextlib.contextmanager
def mistakes_in_a_line(stopped: str = "Stopped.", hint: str = "") -> Iterator[None]:
    """Ends the process without a trace for what its user did, or can mend: with `stopped` after
    Ctrl-C, or the error and the `hint` below it."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(stopped)
    except (ValueError, FloatingPointError, OSError) as error:
        logging.debug("where it was raised", exc_info=True)
        sys.exit(f"error: {error}{hint}")


def at_least(low: float, kind: type = int):
    """A type of arguments: numbers from `low` on."""

    def read(text: str):
        if not kind(text) >= low:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}")
        return kind(text)

    read.__name__ = "number"  # in argparse's "invalid number value"
    return read
