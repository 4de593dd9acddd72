"""Features of one model, kept by what they were made from."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from declip_jax.digests import digest
from declip_jax.files import replacing


class Cache:
    """Arrays that are made once, however often they are asked for.

    Args:
      folder: where they are also kept between programs; None keeps them in memory alone.
      model: digest of the parameters; with a folder, what other models left there is not found.
    """

    def __init__(self, folder: Path | None = None, model: str = ""):
        self._folder, self._model = folder, model
        self._memory: dict[str, dict[str, np.ndarray]] = {}

    def get(self, content: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of `content`: all that they follow from besides the model, as plain values."""
        name = digest([self._model, content])
        if self._folder is None:
            if name not in self._memory:
                self._memory[name] = make()
            return self._memory[name]
        path = self._folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile):
            pass  # not there, or damaged (the last three are zipfile's): made anew
        arrays = make()
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
        return arrays
