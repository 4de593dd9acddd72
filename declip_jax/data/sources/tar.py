"""The members of tar files, read with care: a tar can be cut off, damaged or made to do harm."""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from declip_jax.data.input_files import is_safe, is_utf8

BLOCK = tarfile.BLOCKSIZE  # bytes, 512
MAX_HEADER_BYTES = 64 << 10  # of a member, with the extended ones before it
MAX_END_BYTES = 1 << 20  # of zeros behind the last member
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


class File(NamedTuple):
    """A member of a tar that is a file."""

    key: str
    extension: str  # in lower case
    name: str
    start: int  # byte of its first header
    end: int  # byte behind its last block
    data: slice  # bytes


class _Headers:
    """A stream as `tarfile` sees it, which reads headers only; they can claim any size."""

    def __init__(self, stream: BinaryIO):
        self._stream, self.left = stream, MAX_HEADER_BYTES
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header with {size:,} bytes")
        self.left -= size
        return self._stream.read(size)


def files_of(stream: BinaryIO, size: int, refuse: Callable[[str, str], None]) -> Iterator[File]:
    """The files of a tar of `size` bytes that are whole.

    `refuse` is called with reason and name of each member that is left out. After the whole ones
    it raises tarfile.ReadError if the tar is cut off or damaged, or none at all.
    """
    headers, end = _Headers(stream), 0
    try:
        tar = tarfile.open(fileobj=headers, mode="r:", encoding="utf-8")
        while (member := tar.next()) is not None:
            tar.members.clear()  # or they would all be kept
            if not end < tar.offset <= size:  # also sizes below 0, which would lead back
                raise tarfile.ReadError(f"{member.name!r} is cut off")
            end, headers.left = tar.offset, MAX_HEADER_BYTES
            name = member.name.removeprefix("./")
            if member.isdir():
                continue
            if not is_utf8(name):
                refuse("not UTF-8", name)
            elif not is_safe(name):
                refuse("unsafe name", name)
            elif not member.isreg() or member.issparse():
                refuse("not a file", name)
            elif not all(_key_and_extension(name)):
                refuse("no key and extension", name)
            else:
                data = slice(member.offset_data, member.offset_data + member.size)
                yield File(*_key_and_extension(name), name, member.offset, end, data)
    except (ValueError, IndexError) as error:  # from numbers in headers
        raise tarfile.ReadError(f"damaged header: {error}") from error
    # At a damaged header `tarfile` ends as if it were the end.
    stream.seek(end)
    tail = stream.read(MAX_END_BYTES + 1)
    if len(tail) > MAX_END_BYTES or tail.count(0) < len(tail):
        raise tarfile.ReadError(f"no end and no header at byte {end:,}")


def plain_files(data: memoryview) -> list[File] | None:
    """As `files_of`, for members that were checked before, in a tenth of its time.

    None if there is more to one of them than a plain header and a file.
    """
    files, start = [], 0
    while start < len(data):
        header = bytes(data[start : start + BLOCK])
        # Of the fields of "ustar": the type, and the rest of a long name.
        if len(header) < BLOCK or header[156] not in b"0\0" or header[345]:
            return None
        try:
            name = header[:100].rstrip(b"\0").decode().removeprefix("./")
            size = int(header[124:136].rstrip(b" \0"), 8)
        except ValueError:  # also not UTF-8
            return None
        key, extension = _key_and_extension(name)
        first = start + BLOCK
        end = first + -(-size // BLOCK) * BLOCK
        if not start < end <= len(data) or not key or not extension or not is_safe(name):
            return None
        files.append(File(key, extension, name, start, end, slice(first, first + size)))
        start = end
    return files


def _key_and_extension(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder and stem else stem, extension.lower()


def is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGES  # also "left.jpg", from KEY.left.jpg


def key_hash(key: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
