"""Long lists: in little memory, and little time on their way to another process."""

import itertools
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from declip_jax.digests import digest_of


class CompactList:
    """Values that JSON can hold, one after the other in one string of bytes."""

    def __init__(self, values: Iterable[Any]):
        packed = [json.dumps(value, ensure_ascii=False).encode() for value in values]
        self._ends = np.cumsum([0, *map(len, packed)])
        self._bytes = b"".join(packed)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._bytes[self._ends[index] : self._ends[index + 1]])

    def digest(self) -> str:
        return digest_of([self._bytes], 12)


def stamps(folder: str, names: Iterable[str]) -> str:
    """A digest of where files of a local folder are, of their names, sizes and times."""

    def stamp(name: str) -> bytes:
        try:
            found = os.stat(os.path.join(folder, name))
        except OSError:  # told when it is read
            return json.dumps([name]).encode()
        return json.dumps([name, found.st_size, found.st_mtime_ns]).encode()

    return digest_of(itertools.chain([os.path.abspath(folder).encode()], map(stamp, names)))
