"""Files that are there whole, or not at all, and folders that one run writes at a time."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from declip_jax.data.input_files import InputError


def temporary_name(path: Path) -> Path:
    """Where to write what becomes `path`: another name every time, for a run on several machines
    may try a shard twice at once."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished file its name: even after a power failure it is there whole, or not."""
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    temporary = temporary_name(path)
    temporary.write_text(text)
    publish(temporary, path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the output folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"--output {folder}: another run is writing there; wait for it") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)
