"""Files that are there whole, or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".declip_tmp"  # how names end of files that are not whole


@contextlib.contextmanager
def replacing(path: Path, *, scratch: Path | None = None, overwrite: bool = True) -> Iterator[Path]:
    """A name to write under; once the block has ended well, the file there becomes `path`.

    The name is another one every time, for several may write the same at once, and what is under it
    is removed if the block fails.

    Args:
      path: its folder is made.
      scratch: folder of the file until it is whole, on the same file system; None: that of `path`.
      overwrite: False leaves a `path` that is there already: others may have mapped it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (scratch or path.parent) / (uuid.uuid4().hex + TEMPORARY)
    try:
        yield temporary
        publish(temporary, path, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path, overwrite: bool = True) -> None:
    """Gives a finished file its name: even after a power failure it is there whole, or not."""
    _sync(temporary)
    try:
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        if overwrite:
            raise
        os.replace(temporary, path)  # a file system without links
    with contextlib.suppress(OSError):  # not every file system can do so with folders
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
