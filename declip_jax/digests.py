"""Short names for long contents. They stand in files, so that they never may change."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def digest(value: Any, size: int = 16) -> str:
    """Of a value that JSON can hold, in whatever order its objects are: `size` bytes, as hex."""
    return digest_of([json.dumps(value, sort_keys=True).encode()], size)


def digest_of(parts: Iterable[bytes], size: int = 16) -> str:
    """Of bytes that come in parts: `size` bytes, as hex."""
    hashed = hashlib.blake2b(digest_size=size)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
