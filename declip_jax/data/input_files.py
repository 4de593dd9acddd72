"""Raw downloads: images in a folder or a zip archive, and which captions belong to which.

Each `index_…` function lists a download as items, in an order that follows from the download alone,
without opening an image. What is not usable is refused one by one, with a reason; InputError is
raised where a file, its columns or all class folders are missing.
"""

import csv
import errno
import io
import itertools
import json
import lzma
import os
import posixpath
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from declip_jax.data.records import BadRecord

MAX_IMAGE_BYTES = 256 << 20
MAX_CAPTIONS_BYTES = 32 << 30  # of a captions file inside a zip archive
MAX_LINE = 16 << 20  # characters of a captions file without a line end
MAX_CAPTION = 1 << 20  # characters


class InputError(ValueError):
    """Something the user has to change."""


Refuse = Callable[[str, str, str], None]  # called with what is left out, reason and detail
Refusal = dict[str, str]  # {"key": …, "reason": …, "detail": …}, a line of refused-<split>.jsonl


def refusal(key: str, error: BadRecord) -> Refusal:
    """What is listed of an image, caption or row that is left out; `key` may name a line."""
    key = key.encode(errors="backslashreplace").decode()  # it may be refused for its encoding
    return {"key": key, "reason": error.reason, "detail": error.detail}


class Item(NamedTuple):
    key: str  # the image's name, as `Files.read` takes it
    captions: Sequence[str]
    label: int | None = None
    synthetic: Sequence[str] = ()  # captions that a model wrote


class Index(NamedTuple):
    items: list[Item]
    refused: list[Refusal]
    class_names: list[str]  # by label; empty without classes


class Files:
    """Files by name, in a folder or in a zip archive, from which nothing is ever extracted.

    Names are relative to `subfolder` in it. It can be pickled, for worker processes: each of them
    opens the archive itself. Raises InputError if there is no such folder or archive.
    """

    def __init__(self, root: str, subfolder: str = ""):
        self.root, self.subfolder, self.zip = root, subfolder.strip("/"), None
        if os.path.isdir(root):
            folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
            found = os.path.isdir(os.path.join(root, self.subfolder))
        elif os.path.isfile(root):
            try:
                self.zip = zipfile.ZipFile(root)
            except zipfile.BadZipFile as error:
                raise InputError(
                    f"--images {root}: neither a folder nor a whole zip archive ({error})"
                ) from None
            names = self.zip.namelist()
            folders = {name.split("/")[0] for name in names if "/" in name}
            found = not self.subfolder or any(n.startswith(f"{self.subfolder}/") for n in names)
        else:
            raise InputError(f"--images {root}: no such folder or zip archive")
        if not found:
            raise InputError(
                f"--subfolder {subfolder}: not in {root}, which has {sorted(folders)[:10]}"
            )

    def __reduce__(self):
        return Files, (self.root, self.subfolder)

    def path(self, name: str) -> str:
        """Where `name` is below the root; names that lead out of it are refused."""
        if not is_safe(name):
            raise BadRecord("unsafe name", "an absolute path, or one with '..'")
        return posixpath.normpath(posixpath.join(self.subfolder, name))

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises BadRecord if it cannot be had, is too large or damaged."""
        path = self.path(name)
        if self.zip:
            try:
                member = self.zip.getinfo(path)
            except KeyError:
                raise BadRecord("missing image", f"no {path} in {self.root}") from None
            check_image_size(member.file_size)
            try:
                return self.zip.read(member)  # at most file_size bytes, whatever is packed
            except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError) as e:
                raise BadRecord("unreadable image", f"{path} in {self.root}: {e}") from None
        path = os.path.join(self.root, path)
        try:
            status = os.stat(path)
        except OSError as error:
            # Other errors (a file server that is away, say) must not pass for missing images.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            raise BadRecord("missing image", f"no file {path}") from None
        if not stat.S_ISREG(status.st_mode):
            raise BadRecord("missing image", f"{path} is not a file")
        check_image_size(status.st_size)
        return Path(path).read_bytes()

    def open_text(self, name: str) -> io.TextIOWrapper:
        """A text file, on disk or else in the archive; what is not UTF-8 becomes surrogates."""
        if os.path.isfile(name):
            stream = open(name, "rb")
        elif self.zip and name in self.zip.namelist():
            size = self.zip.getinfo(name).file_size
            if size > MAX_CAPTIONS_BYTES:
                raise InputError(f"--captions {name}: {size:,} bytes in a zip; unpack it first")
            stream = self.zip.open(name)
        else:
            raise InputError(
                f"--captions {name}: no such file{f', not in {self.root} either' * bool(self.zip)}"
            )
        return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")

    def class_members(self) -> Iterator[str]:
        """All "class/", "class/file" and, as far as it takes to refuse them, misplaced names."""
        if self.zip:
            prefix = f"{self.subfolder}/" if self.subfolder else ""
            for name in sorted(self.zip.namelist()):
                if name.startswith(prefix) and name != prefix:
                    yield name.removeprefix(prefix)
        else:
            for name in _list(os.path.join(self.root, self.subfolder)):
                yield name
                if name.endswith("/"):
                    for inner in _list(os.path.join(self.root, self.subfolder, name)):
                        yield name + inner


def _list(folder: str) -> list[str]:
    return sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder))


def check_image_size(size: int) -> None:
    """Raises BadRecord for an encoded image of more than MAX_IMAGE_BYTES."""
    if size > MAX_IMAGE_BYTES:
        raise BadRecord("file too large", f"{size:,} bytes, at most {MAX_IMAGE_BYTES:,}")


def is_safe(name: str) -> bool:
    """Whether a path does not lead out of the folder that it is relative to."""
    return not (name.startswith("/") or ".." in name.split("/") or "\0" in name)


def is_utf8(text: str) -> bool:
    """False with surrogates in it, from `Files.open_text`, file names or JSON's escapes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Captions:
    """Collects captions by image, in the order in which the images are first named."""

    def __init__(self, synthetic: bool):
        self.needs_synthetic = synthetic  # every image, beside its captions
        self.by_key: dict[str, list[str]] = {}
        self.synthetic: dict[str, list[str]] = {}
        self.refused: list[Refusal] = []

    def refuse(self, key: str, reason: str, detail: str) -> None:
        self.refused.append(refusal(key, BadRecord(reason, detail)))

    def add(self, line: str, key: str, captions: Sequence[str], synthetic: Sequence[str]) -> None:
        texts = (key, *captions, *synthetic)
        if not all(map(is_utf8, texts)):
            self.refuse(line, "not UTF-8", f"image {key!r}")
        elif not key:
            self.refuse(line, "bad row", "no image name")
        elif max(map(len, texts)) > MAX_CAPTION:
            self.refuse(line, "caption too long", f"at most {MAX_CAPTION:,} characters")
        else:
            kept = self.by_key.setdefault(key, [])
            for caption in captions:
                if caption.strip():
                    kept.append(caption)
                else:
                    self.refuse(key, "empty caption", line)
            # Rows for several captions of an image may repeat its synthetic one.
            for text in synthetic:
                if text.strip() and text not in self.synthetic.setdefault(key, []):
                    self.synthetic[key].append(text)

    def index(self) -> Index:
        items = []
        for key, captions in self.by_key.items():
            synthetic = self.synthetic.get(key, ())
            if not captions:
                self.refuse(key, "no caption left", "all its captions are empty")
            elif self.needs_synthetic and not synthetic:
                self.refuse(key, "no synthetic caption", "it is missing or empty")
            else:
                items.append(Item(key, captions, synthetic=synthetic))
        return Index(items, self.refused, [])


def _lines(stream: TextIO, name: str) -> Iterator[str]:
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE)
        if len(line) == MAX_LINE:
            raise InputError(
                f"{name}: line {number} has more than {MAX_LINE:,} characters; is it a text file?"
            )
        if not line:
            return
        yield line


def csv_table(
    stream: TextIO, name: str, refuse: Refuse, delimiter: str = ","
) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The header of a CSV file, and its rows, as "line <number>" and {column: value}.

    `name` is what messages call it, such as "--captions rows.csv"; `refuse` is told of each row
    that cannot be used. Raises InputError if it is no text, also while the rows are read.
    """
    rows = csv.reader(_lines(stream, name), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise InputError(f"{name}: not CSV ({error})") from None
    places = {column: header.index(column) for column in header}

    def whole_rows() -> Iterator[tuple[str, dict[str, str]]]:
        while True:
            first = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                # An open quote swallows the lines that follow, hence the range.
                refuse(f"lines {first}-{rows.line_num}", "bad row", str(error))
                continue
            if len(row) == len(header):
                yield f"line {first}", {column: row[place] for column, place in places.items()}
            elif row:  # and not just a blank line
                detail = f"{len(row)} fields, but {len(header)} columns"
                refuse(f"line {first}", "bad row", detail)

    return header, whole_rows()


def check_columns(name: str, columns: Mapping[str, str], present: Sequence[str]) -> None:
    """Raises InputError unless `present` has all of {the flag that names a column: the column}."""
    for flag, column in columns.items():
        if column not in present:
            raise InputError(
                f"{name}: no column {column!r} among {present}; name the right one with {flag}"
            )


def jsonl_rows(
    stream: TextIO, name: str, fields: Sequence[str], refuse: Refuse
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `csv_table`, of a JSON object a line; one without texts in `fields` is refused."""
    for number, text in enumerate(_lines(stream, name), start=1):
        line = f"line {number}"
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            refuse(line, "bad JSON" if is_utf8(text) else "not UTF-8", str(error))
            continue
        row = row if isinstance(row, dict) else {}
        if all(isinstance(row.get(field), str) for field in fields):
            yield line, row
        else:
            texts = " and ".join(map(repr, fields))
            refuse(line, "bad row", f"no texts {texts} among {sorted(row)[:20]}")


def index_csv(
    files: Files, path: str, image: str, caption: str, synthetic: str | None = None
) -> Index:
    """CSV with a header, by the names of its columns; all rows of an image make one item."""
    columns = {"--image-column": image, "--caption-column": caption}
    if synthetic is not None:
        columns["--synthetic-column"] = synthetic
    captions = Captions(synthetic=synthetic is not None)
    with files.open_text(path) as stream:
        header, rows = csv_table(stream, f"--captions {path}", captions.refuse)
        check_columns(f"--captions {path}", columns, header)
        for line, row in rows:
            written = [] if synthetic is None else [row[synthetic]]
            captions.add(line, row[image], [row[caption]], written)
    return captions.index()


def index_jsonl(
    files: Files, path: str, image: str, caption: str, synthetic: str | None = None
) -> Index:
    """A JSON object a line, by its fields, an item each; another of the same image is refused."""
    captions = Captions(synthetic=synthetic is not None)
    with files.open_text(path) as stream:
        rows = jsonl_rows(stream, f"--captions {path}", (image, caption), captions.refuse)
        for line, row in rows:
            key, written = row[image], row.get(synthetic)
            if written is not None and not isinstance(written, str):
                captions.refuse(line, "bad row", f"{synthetic!r} is no text")
            elif key in captions.by_key:
                captions.refuse(key, "duplicate key", line)
            else:
                captions.add(line, key, [row[caption]], [written or ""])
    return captions.index()


def index_imagefolder(
    files: Files, templates: Sequence[str], classes: str | None, synthetic: Sequence[str] = ()
) -> Index:
    """Folders of images, one a class. The captions of an image are the templates, with the
    readable name of its class for {}, and so are its synthetic ones. Items are sorted by label,
    then by name.
    """
    members: dict[str, list[str]] = {}  # class folder -> keys
    refused, seen = [], set()
    for name in files.class_members():
        *folders, last = name.split("/")
        try:
            files.path(name)
            if any(part.startswith((".", "__MACOSX")) for part in (*folders, last)):
                continue  # what operating systems leave behind
            if not is_utf8(name):
                raise BadRecord("not UTF-8", "its name")
            if len(folders) != 1:
                raise BadRecord("misplaced file", "not directly in a class folder")
            if name in seen:
                raise BadRecord("duplicate key", f"more than once in {files.root}")
        except BadRecord as error:
            refused.append(refusal(name, error))
            continue
        seen.add(name)
        keys = members.setdefault(folders[0], [])
        if last:
            keys.append(name)
    if not any(members.values()):
        expected = posixpath.join(files.root, files.subfolder, "<class>", "<image>")
        deeper = [entry["key"] for entry in refused if entry["key"].count("/") > 1]
        hint = f"; there is {deeper[0]}, perhaps pass --subfolder" if deeper else ""
        raise InputError(f"--images {files.root}: found no {expected}{hint}")

    names = read_class_names(classes, sorted(members))
    items = []
    for label, (folder, readable) in enumerate(names.items()):
        captions, written = (
            [template.replace("{}", readable) for template in several]
            for several in (templates, synthetic)
        )
        items += [Item(key, captions, label, written) for key in members[folder]]
    return Index(items, refused, list(names.values()))


def read_class_names(path: str | None, folders: Sequence[str]) -> dict[str, str]:
    """Class folder -> readable name, in the order of the labels.

    Without a file, underscores become spaces. A file has one class a line: either every line is
    "folder<TAB>readable name" (or = for the TAB), or the lines are the readable names in the order
    of `folders`. Raises InputError if the file and the folders do not match, or two classes have
    the same name.
    """
    if path is None:
        names = {folder: folder.replace("_", " ") for folder in folders}
    else:
        try:
            text = Path(path).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--classes {path}: {error}") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [[part.strip() for part in re.split("[\t=]", line, maxsplit=1)] for line in lines]
        if max(map(len, pairs), default=1) == 1:
            if len(lines) != len(folders):
                raise InputError(
                    f"--classes {path}: {len(lines)} names for {len(folders)} class folders"
                )
            names = dict(zip(folders, lines, strict=True))
        else:
            for line, pair in zip(lines, pairs, strict=True):
                if len(pair) == 1 or not all(pair):
                    raise InputError(
                        f"--classes {path}: {line!r} is not folder<TAB>name, as other lines are"
                    )
            names = dict(pairs)
            missing, extra = sorted(set(names) - set(folders)), sorted(set(folders) - set(names))
            if missing or extra or len(names) < len(pairs):
                raise InputError(
                    f"--classes {path}: needs every class folder once; listed {len(pairs)}, "
                    f"without a folder {missing[:5]}, not listed {extra[:5]}"
                )
    for readable, count in Counter(names.values()).items():
        if count > 1:
            same = [folder for folder, name in names.items() if name == readable]
            raise InputError(
                f"the classes {same} have the same readable name {readable!r}; "
                "tell them apart with --classes"
            )
    return names
