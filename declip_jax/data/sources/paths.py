"""Files on disk and in object stores: lists of shards, and ranges of bytes.

Paths are local or URLs that fsspec knows, such as gs:// (with gcsfs) and s3:// (with s3fs).
"""

import itertools
from typing import NamedTuple

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand

MAX_SHARDS = 1_000_000  # of one list; a pattern can ask for any number


class FileVersion(NamedTuple):
    size: int  # bytes
    modified: str  # ISO 8601


def expand(pattern: str, suffix: str) -> list[str]:
    """The files that a pattern stands for, each once, those of each alternative sorted.

    Args:
      pattern: a file, a folder (its files with `suffix`), or a pattern with braces, as in
        "cc12m-{00000..01242}.tar" and "{cc3m,cc12m}", and with *, ? and [ ].
      suffix: of the files in a folder, such as ".tar".

    Raises:
      ValueError: no such files, braces that do not match, or a file system that is not installed.
    """
    try:
        alternatives = list(itertools.islice(braceexpand(pattern), MAX_SHARDS + 1))
    except UnbalancedBracesError as error:
        raise ValueError(f"{pattern!r} has braces that do not match: {error}.") from None
    if len(alternatives) > MAX_SHARDS:
        raise ValueError(f"{pattern!r} stands for more than {MAX_SHARDS:,} files.")
    found: dict[str, None] = {}
    for alternative in alternatives:
        fs, path = file_system(alternative)
        if any(character in path for character in "*?["):
            matches = sorted(fs.glob(path))
        elif fs.isdir(path):
            matches = sorted(name for name in fs.ls(path, detail=False) if name.endswith(suffix))
        else:
            matches = [path] if fs.exists(path) else []
        if not matches:
            among = f" (one of the {len(alternatives)} of {pattern!r})" * (len(alternatives) > 1)
            raise ValueError(
                f"{alternative!r}{among} matches nothing: expected a file, a pattern, or a folder "
                f"with files that end in {suffix}."
            )
        remote = is_remote(alternative)
        found |= dict.fromkeys(fs.unstrip_protocol(m) if remote else m for m in matches)
    return list(found)


def is_remote(path: str) -> bool:
    return "://" in path


def file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path, and what that calls it.

    Raises:
      ValueError: the file system is unknown or not installed.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be opened: {error}.") from error


def version(path: str) -> FileVersion:
    """Size and time of a file, which tell whether it has changed."""
    fs, name = file_system(path)
    return FileVersion(fs.size(name), fs.modified(name).isoformat())


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from byte `start`; fewer at its end."""
    fs, name = file_system(path)
    return fs.cat_file(name, start=start, end=start + size)
