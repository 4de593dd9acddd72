"""Files on disk and in object stores: lists of shards, and ranges of bytes.

Paths are local or URLs that fsspec knows, such as gs:// (with gcsfs) and s3:// (with s3fs).
"""

import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand

MAX_SHARDS = 1_000_000  # of one list; a pattern can ask for any number
REQUESTS = 32  # at a time: of thousands of files in an object store, each answers late

_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})")


class FileVersion(NamedTuple):
    size: int  # bytes
    modified: str  # as the file system tells it; "" where it does not


def expand(pattern: str, suffix: str) -> list[str]:
    """The files that a pattern stands for, each once, those of each alternative sorted.

    Args:
      pattern: a file, a folder (its files with `suffix`), or a pattern with braces, as in
        "cc12m-{00000..01242}.tar" and "{cc3m,cc12m}", and with *, ? and [ ].
      suffix: of the files in a folder, such as ".tar".

    Raises:
      ValueError: no such files, braces that do not match, or a file system that is not installed.
    """
    # Its ranges are made whole before any of it comes.
    huge = any(abs(int(b) - int(a)) >= MAX_SHARDS for a, b in _RANGE.findall(pattern))
    try:
        alternatives = [] if huge else list(itertools.islice(braceexpand(pattern), MAX_SHARDS + 1))
    except UnbalancedBracesError as error:
        raise ValueError(f"{pattern!r} has braces that do not match: {error}.") from None
    if huge or len(alternatives) > MAX_SHARDS:
        raise ValueError(f"{pattern!r} stands for more than {MAX_SHARDS:,} files.")

    def matches(alternative: tuple[fsspec.AbstractFileSystem, str]) -> list[str]:
        fs, path = alternative
        if any(character in path for character in "*?["):
            infos = fs.glob(path, detail=True)
            return sorted(name for name in infos if infos[name]["type"] != "directory")
        try:
            is_folder = fs.info(path)["type"] == "directory"
        except (FileNotFoundError, NotADirectoryError):
            return []
        if not is_folder:
            return [path]
        return sorted(name for name in fs.ls(path, detail=False) if name.endswith(suffix))

    systems = [file_system(alternative) for alternative in alternatives]
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = list(pool.map(matches, systems))
    files: dict[str, None] = {}
    for alternative, (fs, _), names in zip(alternatives, systems, found, strict=True):
        if not names:
            among = f" (one of the {len(alternatives)} of {pattern!r})" * (len(alternatives) > 1)
            raise ValueError(
                f"{alternative!r}{among} matches nothing: expected a file, a pattern, or a folder "
                f"with files that end in {suffix}."
            )
        remote = is_remote(alternative)
        files |= dict.fromkeys(fs.unstrip_protocol(n) if remote else n for n in names)
    return list(files)


def is_remote(path: str) -> bool:
    return "://" in path


def file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path, and what that calls it; ValueError if it is not installed."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        extra = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}.get(path.partition("://")[0])
        hint = f" pip install 'declip-jax[{extra}]' brings it." if extra else ""
        raise ValueError(f"{path!r} cannot be opened: {error}.{hint}") from error


def versions(paths: Sequence[str]) -> list[FileVersion]:
    """Size and time of each file, which tell whether it has changed."""

    def version(place: tuple[fsspec.AbstractFileSystem, str]) -> FileVersion:
        fs, path = place
        info = fs.info(path)
        # Local and gs, s3, Azure, others.
        fields = ("mtime", "LastModified", "last_modified", "ETag", "created")
        return FileVersion(info["size"], next((str(info[f]) for f in fields if f in info), ""))

    # From this thread, for fsspec makes a file system of its own for each.
    systems = [file_system(path) for path in paths]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(version, systems))


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from byte `start`; fewer at its end."""
    if is_remote(path):
        fs, name = file_system(path)
        return fs.cat_file(name, start=start, end=start + size)
    descriptor = os.open(path, os.O_RDONLY)  # a fifth of the time that fsspec takes
    try:
        return os.pread(descriptor, size, start)
    finally:
        os.close(descriptor)
