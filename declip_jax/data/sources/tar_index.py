"""The index of webdataset shards: where each sample is in its tar, kept in a cache folder."""

import contextlib
import itertools
import json
import os
import random
import struct
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from declip_jax.data.input_files import MAX_IMAGE_BYTES
from declip_jax.data.parallel import Progress, Tick, parallel
from declip_jax.data.sources import paths
from declip_jax.data.sources.base import Refused, count_refused, tell_refused
from declip_jax.data.sources.tar import BLOCK, File, files_of, is_image, key_hash
from declip_jax.digests import digest
from declip_jax.files import TEMPORARY, replacing

FORMAT = 1  # of the files in the cache folder
# The span of a sample in blocks of its tar, and a hash of its key.
RECORD = np.dtype([("block", "<u4"), ("blocks", "<u4"), ("key", "<u8")])
MAX_TAR_BYTES = BLOCK << 32  # what numbers of blocks can say
MAX_SAMPLE_BYTES = MAX_IMAGE_BYTES + (16 << 20)  # that is read at once


def open_index(tars: Sequence[str], cache: str) -> Path:
    """The table of the index of all tars, which is made if need be.

    The folder has, for each tar, an .npz file with its RECORD array and what was refused; and for
    all of them together a .bin file, those arrays one after the other, and a .json file, the table,
    with the number of records of each. Their names tell of which files in which version they are.
    Raises ValueError if there is no record, or no folder to write to.
    """
    versions = paths.versions(tars)
    for tar, version in zip(tars, versions, strict=True):
        if version.size > MAX_TAR_BYTES:
            raise ValueError(f"{tar} has {version.size:,} bytes: at most {MAX_TAR_BYTES:,} can be.")
    places = [_place(folder, tars, versions) for folder in _folders(tars, cache)]
    for _, table in places:  # also one that somebody else wrote, where we cannot
        if _is_whole(table):
            return table
    errors = []
    for files, table in places:
        try:
            table.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=table.parent).close()
        except OSError as error:
            errors.append(str(error))
            continue
        if table.exists():  # written last, so this is damage, and nobody is at work on it
            for damaged in (table, table.with_suffix(".bin")):
                damaged.unlink(missing_ok=True)
        _index_tars(tars, versions, files)
        _merge(tars, files, table)
        _tidy(files, table)
        if not _is_whole(table):
            raise ValueError(f"the index {table} is damaged; delete {table.parent} and try again.")
        return table
    raise ValueError(
        f"the index of {tars[0]} and what is beside it cannot be written ({'; '.join(errors)}): "
        "set config.data.index_cache to a folder where it can."
    )


def _is_whole(table: Path) -> bool:
    try:
        records = sum(json.loads(table.read_text(encoding="utf-8"))["records"])
        return table.with_suffix(".bin").stat().st_size == records * RECORD.itemsize
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _folders(tars: Sequence[str], cache: str) -> list[Path]:
    """Where the index may be, the best place first."""
    if paths.is_remote(cache):
        raise ValueError(f"config.data.index_cache={cache!r} must be a folder on a local disk.")
    if cache:
        return [Path(cache).expanduser().absolute()]
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    beside = [] if paths.is_remote(tars[0]) else [Path(tars[0]).parent / ".declip_index"]
    return [*beside, home.absolute() / "declip_jax"]


def _place(
    folder: Path, tars: Sequence[str], versions: Sequence[paths.FileVersion]
) -> tuple[list[Path], Path]:
    """The index file of each tar in a folder, and the table of all."""
    files = []
    for tar, version in zip(tars, versions, strict=True):
        # Relative, so that shards and the folder beside them can move, or be mounted elsewhere.
        name = tar if paths.is_remote(tar) else os.path.relpath(tar, folder)
        base = os.path.basename(tar)[:100]
        files.append(folder / f"{base}-{digest([FORMAT, name], 12)}-{digest(version, 12)}.npz")
    return files, folder / f"index-{digest([file.name for file in files], 12)}.json"


def _index_tars(
    tars: Sequence[str], versions: Sequence[paths.FileVersion], files: Sequence[Path]
) -> None:
    """Makes the index files of tars that have none."""
    jobs = [
        (tar, version.size, file)
        for tar, version, file in zip(tars, versions, files, strict=True)
        if _load(file) is None
    ]
    # All processes of a run begin at the same time: in different orders they share the work.
    random.SystemRandom().shuffle(jobs)
    processes = min(os.cpu_count() or 1, len(jobs) // 4)  # for a few, starting takes longer
    for _ in parallel(_index_tar, jobs, processes, Progress(0, len(jobs), "shards")):
        pass


def _index_tar(job: tuple[str, int, Path], tick: Tick) -> None:
    tar, size, file = job
    if _load(file) is None:  # else another process has been here
        file.unlink(missing_ok=True)  # it is damaged
        records, refused = scan(tar, size)
        with _written(file) as stream:
            np.savez(stream, records=records, refused=json.dumps(refused))
    tick()


def _merge(tars: Sequence[str], files: Sequence[Path], table: Path) -> None:
    """Writes the index of all tars, the table last."""
    counts, refused = [], {}
    with _written(table.with_suffix(".bin")) as stream:
        for file in files:
            records, left_out = _load(file)
            counts.append(len(records))
            stream.write(records.tobytes())
            for reason, (count, names) in left_out.items():
                count_refused(refused, reason, count, names)
        if not any(counts):
            left_out = f"; left out: {tell_refused(refused)}" if refused else ""
            raise ValueError(
                f"{tars[0]}{' and others' * (len(tars) > 1)}: no sample with an image, expected "
                f"KEY.jpg, KEY.txt and so on{left_out}."
            )
    with _written(table) as stream:
        contents = {"records": counts, "refused": refused, "files": [f.name for f in files]}
        stream.write(json.dumps(contents).encode())


def _load(file: Path) -> tuple[np.ndarray, Refused] | None:
    """What `_index_tar` wrote; None if it is not there or damaged."""
    try:
        with np.load(file, allow_pickle=False) as contents:
            return contents["records"].astype(RECORD), json.loads(str(contents["refused"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file to write. One that is there already is left, for it has the same content."""
    with replacing(path, overwrite=False) as temporary, open(temporary, "xb") as stream:
        yield stream


def _tidy(files: Sequence[Path], table: Path) -> None:
    """Removes what is of earlier versions of the tars, and what killed processes left."""
    folder, names = table.parent, {file.name for file in files}
    tars = {name.rpartition("-")[0] for name in names}
    yesterday = time.time() - 24 * 3600
    with contextlib.suppress(FileNotFoundError):  # another process tidies too
        for entry in list(os.scandir(folder)):
            tar, _, version = entry.name.rpartition("-")
            if (version.endswith(".npz") and tar in tars and entry.name not in names) or (
                entry.name.endswith(TEMPORARY) and entry.stat().st_mtime < yesterday
            ):
                os.unlink(entry.path)
    for other in folder.glob("index-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            parts = json.loads(other.read_text(encoding="utf-8"))["files"]
            # Who has it mapped keeps it.
            if not all((folder / part).exists() for part in parts):
                other.unlink()
                other.with_suffix(".bin").unlink()


def scan(tar: str, size: int) -> tuple[np.ndarray, Refused]:
    """The index of a tar, RECORD [N], and what is left out of it."""
    records, keys, refused = bytearray(), set(), {}

    def refuse(reason: str, name: str) -> None:
        name = name.encode(errors="backslashreplace").decode()
        count_refused(refused, reason, 1, [f"{tar}: {name[:200]}"])

    def until_damage(stream: BinaryIO) -> Iterator[File]:
        try:
            yield from files_of(stream, size, refuse)
        except tarfile.ReadError as error:
            refuse("damaged shard", str(error))

    fs, path = paths.file_system(tar)
    with fs.open(path, "rb") as stream:
        before = set()
        for key, files in itertools.groupby(until_damage(stream), lambda file: file.key):
            start, extensions = None, set()
            for file in files:
                start = file.start if start is None else start
                if file.extension in extensions:
                    refuse("duplicate key", file.name)
                extensions.add(file.extension)
            # What follows is lost: it is whole if it has all that the sample before it had.
            if "damaged shard" in refused and not (before and before <= extensions):
                break
            before, hashed, length = extensions, key_hash(key), file.end - start
            if not any(map(is_image, extensions)):
                refuse("no image", key)
            elif hashed in keys:
                refuse("duplicate key", key)
            elif length > MAX_SAMPLE_BYTES:
                refuse("file too large", key)
            else:
                keys.add(hashed)
                records += struct.pack("<IIQ", start // BLOCK, length // BLOCK, hashed)
    return np.frombuffer(records, RECORD), refused
