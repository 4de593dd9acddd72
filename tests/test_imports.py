"""The package's layers: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

from declip_jax.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "declip_jax"

# Of the standard library alone; all may use them.
BASICS = {"digests", "files", "hints", "section"}
# Parts of the package that each part may use besides itself; parts not named here may use all.
ALLOWED = {
    **{name: set() for name in BASICS},
    "losses": set(),
    "models": {"section"},
    "state": set(),
    "data": set(),
    "support_set": set(),
    "methods": {"losses", "models", "support_set"},
    "interop": {"data", "models"},
    "evals": {"data"},
    "parallel": set(),
    "optim": {"parallel"},
    "augment": set(),
    "metrics": set(),
}
# Reading PyTorch's files and comparing with its programs need it: there, in functions alone.
USE_TORCH = {"interop/reading.py", "interop/verify.py"}
STACK = {"jax", "flax", "optax", "numpy"}  # all that losses, models, support_set and state need


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path):
    yield from imports_of(ast.walk(ast.parse(path.read_text(encoding="utf-8"))), path)


def imports_at_start(path: Path):
    """Those that importing the module runs."""
    todo = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in todo:
        if not isinstance(node, ast.FunctionDef | ast.Lambda) and not is_for_types(node):
            todo += ast.iter_child_nodes(node)
    yield from imports_of(todo, path)


def is_for_types(node) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def imports_of(nodes, path: Path):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_rules(path):
    part = part_of(path)
    for name in imports(path):
        top, *rest = name.split(".")
        assert top not in ("configs", "tests", "tensorflow"), name
        assert top != "torch" or str(path.relative_to(PACKAGE)) in USE_TORCH, name
        if top == "declip_jax" and rest and part in ALLOWED:
            assert rest[0] in ALLOWED[part] | BASICS | {part}, f"{part} must not use {name}"
        if part in BASICS | {"losses", "models", "support_set", "state"}:
            others = set() if part in BASICS else STACK
            assert top in others | {"declip_jax"} or top in sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(USE_TORCH))
def test_torch_is_imported_where_it_is_needed_alone(name):
    assert "torch" in imports(PACKAGE / name) and "torch" not in imports_at_start(PACKAGE / name)


def test_a_run_that_reads_no_tfds_data_does_not_import_tfds():
    """It takes a second, of every process."""
    todo = [PACKAGE / f"{name}.py" for name in ("train", "scoring", "exporting", "drawing")]
    todo += [PACKAGE / "report" / "page.py", PACKAGE / "data" / "pipeline.py"]
    for path in todo:  # and what these import at their start, and so on
        names = list(imports_at_start(path))
        assert not any(name.startswith("tensorflow_datasets") for name in names), path
        places = [ROOT.joinpath(*name.split(".")) for name in names]
        files = [f for p in places for f in (p.with_suffix(".py"), p / "__init__.py")]
        todo += [file for file in files if file.exists() and file not in todo]
    assert PACKAGE / "data" / "records.py" in todo and PACKAGE / "evals/sets/__init__.py" in todo


@pytest.mark.parametrize("command", sorted({module for module, _ in COMMANDS.values()}))
def test_no_command_imports_another_and_nothing_imports_a_command(command):
    for path in FILES:
        if part_of(path) != command:
            for name in imports(path):
                top = name.removeprefix("declip_jax.").split(".")[0]
                assert top != command or not name.startswith("declip_jax."), f"{path}: {name}"


# The set-up and what stands above it; what lies below is handed the sections that it heeds.
MAY_TAKE_THE_WHOLE_CONFIGURATION = {"config", "step", "train", "trained"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_below_the_set_up_nothing_takes_the_whole_configuration(path):
    if "declip_jax.config" in set(imports(path)):
        assert part_of(path) in MAY_TAKE_THE_WHOLE_CONFIGURATION


def test_methods_share_terms_in_one_direction():
    """Python would not mind a circle until a name is missing."""
    uses = {}
    for path in (PACKAGE / "methods").glob("[!_]*.py"):
        names = [name.removeprefix("declip_jax.methods.") for name in imports(path)]
        uses[path.stem] = {name.split(".")[0] for name in names}
    uses = {name: used & set(uses) for name, used in uses.items()}
    while ready := [name for name, used in uses.items() if not used]:
        for name in ready:
            del uses[name]
        uses = {name: used - set(ready) for name, used in uses.items()}
    assert not uses


def test_every_allowed_part_exists():
    assert ALLOWED.keys() <= {part_of(path) for path in FILES}
