"""The package's layers: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "declip_jax"

# Parts of the package that each part may use besides itself; parts not named here may use all.
ALLOWED = {
    "losses": set(),
    "models": set(),
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
            assert rest[0] in ALLOWED[part] | {part}, f"{part} must not use {name}"
        if part in ("losses", "models", "support_set", "state"):
            assert top in STACK | {"declip_jax"} or top in __import__("sys").stdlib_module_names


@pytest.mark.parametrize("name", sorted(USE_TORCH))
def test_torch_is_imported_where_it_is_needed_alone(name):
    assert "torch" in imports(PACKAGE / name) and "torch" not in imports_at_start(PACKAGE / name)


def test_a_run_that_reads_no_tfds_data_does_not_import_tfds():
    """It takes a second, of every process."""
    todo = [PACKAGE / f"{command}.py" for command in ("train", "evaluate", "export", "views")]
    todo += [PACKAGE / "report" / "cli.py", PACKAGE / "data" / "pipeline.py"]
    for path in todo:  # and what these import at their start, and so on
        names = list(imports_at_start(path))
        assert not any(name.startswith("tensorflow_datasets") for name in names), path
        places = [ROOT.joinpath(*name.split(".")) for name in names]
        files = [f for p in places for f in (p.with_suffix(".py"), p / "__init__.py")]
        todo += [file for file in files if file.exists() and file not in todo]
    assert PACKAGE / "data" / "records.py" in todo and PACKAGE / "evals/sets/__init__.py" in todo


def test_no_method_imports_another():
    shared = {"base", "__init__"}
    names = {p.stem for p in (PACKAGE / "methods").glob("*.py")} - shared
    for name in names:
        for imported in imports(PACKAGE / "methods" / f"{name}.py"):
            other = imported.removeprefix("declip_jax.methods").strip(".").split(".")[0]
            assert other not in names - {name}, f"{name} imports {imported}"


def test_every_allowed_part_exists():
    assert ALLOWED.keys() <= {part_of(path) for path in FILES}
