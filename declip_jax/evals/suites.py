"""Which sets a suite scores, and how: the published protocols, or a file of one's own.

An entry is a dict with "task" and that task's settings; `declip_jax.evals.suite` reads them.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from declip_jax.evals import sets
from declip_jax.hints import did_you_mean

ELEVEN = sets.NAMES[:11]  # the rest are variants of ImageNet's test split


def _entries(task: str, names: tuple[str, ...], **settings) -> list[dict[str, Any]]:
    return [dict(task=task, set=name, **settings) for name in names]


SUITES = {
    # Li et al. 2022, arXiv:2110.05208; Cui et al. 2022, arXiv:2203.05796
    "declip": _entries("zeroshot", ELEVEN) + _entries("linear_probe", ELEVEN),
    # Yang et al. 2023, arXiv:2308.08428
    "alip": (
        _entries("zeroshot", ELEVEN)
        + _entries("retrieval", sets.RETRIEVAL, prefix="a photo of ")
        + _entries("linear_probe", ELEVEN[:-1])
    ),
    "retrieval": _entries("retrieval", sets.RETRIEVAL),
    "all": (
        _entries("zeroshot", sets.NAMES)
        + _entries("retrieval", sets.RETRIEVAL)
        + _entries("linear_probe", ELEVEN)
        + _entries("knn", ELEVEN)
        + _entries("few_shot", ELEVEN)
    ),
}


def load(name: str) -> list[dict[str, Any]]:
    """The entries of a suite.

    Args:
      name: of SUITES; or a Python file with get_suite(), which returns such a list. It is run, as a
        configuration file is.

    Raises ValueError: neither, or a file that returns something else.
    """
    if name in SUITES:
        return SUITES[name]
    if not name.endswith(".py"):
        raise ValueError(
            f"suite {name!r} is unknown.{did_you_mean(name, SUITES)} Expected one of "
            f"{list(SUITES)}, or a .py file with get_suite()."
        )
    if not Path(name).is_file():
        raise ValueError(f"suite {name!r}: there is no such file.")
    spec = importlib.util.spec_from_file_location("suite_of_the_user", name)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        entries = list(module.get_suite())
    except Exception as error:
        raise ValueError(f"suite {name!r} cannot be read: {error!r}.") from error
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(
            f"suite {name!r}: get_suite() must return dicts such as dict(task='zeroshot', "
            f"set='cifar10'), at least one; got {entries!r}."
        )
    return [dict(entry) for entry in entries]
