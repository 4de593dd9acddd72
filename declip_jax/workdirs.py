"""The folder of a run: whether it can be used, and what the run is in plain files."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax

PARAMETERS = "parameters.txt"  # a table of them


def check(workdir: Path) -> None:
    """Raises ValueError, before anything is computed, if `workdir` surely cannot be created."""
    there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise _unwritable(workdir, f"{there} is no folder to write in")


def create(workdir: Path) -> None:
    """Creates `workdir`. Raises ValueError if it cannot be written to."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise _unwritable(workdir, error.strerror) from error


def describe(workdir: Path, config: dict[str, Any], params) -> None:
    """Writes a `Config.record` and a table of the parameters."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (workdir / "config.json").write_text(text + "\n", encoding="utf-8")
    parameters = clu.parameter_overview.get_parameter_overview(params)
    if jax.process_index() == 0:  # of the processes, the one that writes such files
        (workdir / PARAMETERS).write_text(parameters + "\n", encoding="utf-8")


def _unwritable(workdir: Path, why: str) -> ValueError:
    return ValueError(f"--workdir={workdir} cannot be written to ({why}): choose another folder.")
