"""The command lines: what they share, and all of them under one name."""

import subprocess
import sys
from pathlib import Path

import pytest

from declip_jax import cli, flags
from tests.commands import ROOT

QUICK = "configs/quickstart.py:tiny"


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(*arguments, config=True):
    parser = flags.Parser("a-command", "Does it.", config=config)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=flags.at_least(1), default=2)
    return parser.parse_args(arguments)


def test_a_configuration_and_its_fields():
    fields = ["--config.optim.peak_lr=5e-4", "--config.seed", "3", "--noconfig.init_resize"]
    args = parse(f"--config={QUICK}", *fields, "--config.optim.frozen=('^image',)", "--out=x")
    assert args.config.optim.peak_lr == 5e-4 and args.config.seed == 3
    assert args.config.optim.frozen == ("^image",) and args.config.init_resize is False
    assert args.config_file == QUICK and args.out == Path("x") and args.count == 2
    assert args.config.is_locked


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--config.optim.peek_lr=1"], 'Did you mean "peak_lr" instead of "peek_lr"?'),
        (["--config.optim.peak_lr=x"], "could not convert string to float: 'x'"),
        (["--config.zzz=1"], "the configuration has no field 'zzz'"),
        (["--config", "nowhere.py"], "nowhere.py"),
        (["--config", "configs/quickstart.py:x"], "config argument 'x' is unknown"),
        (["--oot=y"], "there is no flag --oot. Did you mean '--out'?"),
        (["y"], "unexpected arguments ['y']: fields are set as --config.a.b=c"),
        (["--count=0"], "argument --count: 0 must be at least 1"),
        (["--count=x"], "argument --count: invalid number value: 'x'"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_mistake_is_a_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--config", QUICK, "--out=x", *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and said in line


def test_a_command_without_a_configuration_has_no_fields(capsys):
    with pytest.raises(SystemExit):
        parse("--out=x", "--config.seed=1", config=False)
    assert "there is no flag --config.seed" in capsys.readouterr().err


def test_old_names_of_fields_are_read_and_the_new_ones_told(capsys):
    old = ["--config.loss.mlm_places=0.5", "--config.views.weak.grey_prob", "0.25"]
    config = parse("--config", QUICK, "--out=x", *old).config
    assert config.loss.mlm_capacity == 0.5 and config.views.weak.grayscale_prob == 0.25
    told = capsys.readouterr().err
    assert "config.loss.mlm_places is called config.loss.mlm_capacity now.\n" in told


def test_errors_of_a_command_are_lines():
    with pytest.raises(SystemExit) as stop, flags.mistakes_in_a_line(hint="\n(more)"):
        raise ValueError("wrong")
    assert stop.value.code == "error: wrong\n(more)"
    with pytest.raises(SystemExit) as stop, flags.mistakes_in_a_line("Stopped."):
        raise KeyboardInterrupt
    assert stop.value.code == "Stopped."


def test_all_commands_under_one_name(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.COMMANDS)
    assert cli.main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "error: there is no command 'trian'. Did you mean 'train'? There are train, " in said


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_has_help_both_ways_before_jax_starts(name):
    module = f"declip_jax.{cli.COMMANDS[name][0]}"
    script = (
        "import contextlib, sys\nfrom declip_jax import cli\n"
        "with contextlib.suppress(SystemExit):\n    cli.main(sys.argv[1:])\n"
        "assert 'jax' not in sys.modules\n"
    )
    for start, prog in (
        (["-c", script, name], f"declip-jax {name}"),
        (["-m", module], f"python -m {module}"),
    ):
        done = subprocess.run(
            [sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {prog} ")


def test_a_file_of_an_earlier_version_and_fields_by_either_name(tmp_path, capsys):
    """A file that stands by itself, with old names alone; and one that adds them to today's."""
    alone, added = tmp_path / "alone.py", tmp_path / "added.py"
    alone.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(method='clip', loss=dict(mlm_places=0.1))).lock()\n"
    )
    added.write_text(
        "from configs import common\n"
        "def get_config(arg=''):\n"
        "    config = common.get_config().unlock()\n"
        "    config.loss.mlm_places = 0.1\n"
        "    return common.finish(config, arg)\n"
    )
    for file in (alone, added):
        assert flags.read_config(str(file)).loss.mlm_capacity == 0.1
        for name in ("mlm_capacity", "mlm_places"):
            config = flags.read_config(str(file), [f"--config.loss.{name}=0.5"])
            assert config.loss.mlm_capacity == 0.5 and "mlm_places" not in config.loss
    locked = tmp_path / "locked.py"
    locked.write_text(added.read_text().replace(".unlock()", ""))
    with pytest.raises(ValueError, match="mlm_places, which is called config.loss.mlm_capacity"):
        flags.read_config(str(locked))
