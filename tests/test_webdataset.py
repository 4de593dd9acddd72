import contextlib
import io
import json
import os
import pickle
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from declip_jax.data import input_files
from declip_jax.data.records import BadRecord
from declip_jax.data.sources import Columns, open_source, tar_index, webdataset
from declip_jax.data.sources.tar import key_hash
from declip_jax.data.sources.webdataset import WebDataset

USUAL = Columns()


def tar_bytes(members, **options) -> bytes:
    """A tar of (name, data) pairs and of TarInfo objects without data."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def sample(key, **more) -> list[tuple[str, bytes]]:
    """KEY.jpg, KEY.txt and KEY.json; no image is decoded here."""
    number = f"{key} ".encode()
    meta = {"caption": f"json of {key}", "uid": 7, "others": ["one", " ", None, "two"]}
    parts = {
        "jpg": number * 100,
        "txt": b"caption of " + number,
        "json": json.dumps(meta).encode(),
    } | more
    return [(f"{key}.{extension}", data) for extension, data in parts.items() if data is not None]


def write(folder: Path, *shards, first: int = 0) -> None:
    for number, members in enumerate(shards, start=first):
        (folder / f"{number:05d}.tar").write_bytes(tar_bytes(members))


def keys(source) -> list[str]:
    return [source[index]["key"] for index in range(len(source))]


def counts(source) -> dict[str, int]:
    return {reason: count for reason, (count, _) in source.refused.items()}


def read_one(tmp_path, columns=USUAL, **parts):
    write(tmp_path, sample("a", **parts))
    return WebDataset(str(tmp_path), columns)[0]


def bad_reason(tmp_path, columns=USUAL, **parts) -> str:
    with pytest.raises(BadRecord) as error:
        read_one(tmp_path, columns, **parts)
    return error.value.reason


# What a record is -------------------------------------------------------------------------------


def test_records(tmp_path):
    write(tmp_path, sample("000001") + sample("000002"), [], sample("x/000003", json=None))
    source = WebDataset(str(tmp_path / "{00000..00002}.tar"), USUAL)
    assert len(source) == 3
    assert source[1] == {
        "image": b"000002 " * 100,
        "captions": ["caption of 000002"],
        "key": "000002",
    }
    assert source[2]["key"] == "x/000003"
    assert source.refused == {} and source.class_names == () and source.blocks is None
    assert source.locate(2) == f"{tmp_path}/00002.tar: x/000003"
    assert "00002" in str(source)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(
    "columns, expected",
    [
        (Columns(captions=("json.caption",)), {"captions": ["json of a"]}),
        (Columns(captions=("txt", "json.others")), {"captions": ["caption of a", "one", "two"]}),
        (Columns(captions=("alt.txt",)), {"captions": ["alt"]}),
        (Columns(synthetic=("json.others",)), {"synthetic": ["one", "two"]}),
        (Columns(key="json.uid"), {"key": "7"}),
        (Columns(key="json.caption"), {"key": "json of a"}),
        (Columns(image="mask.png"), {"image": b"mask"}),
    ],
)
def test_columns(tmp_path, columns, expected):
    record = read_one(tmp_path, columns, **{"alt.txt": b"alt", "mask.png": b"mask"})
    assert record.items() >= expected.items()
    assert ("synthetic" in record) == bool(columns.synthetic)


def test_captions_from_json_where_there_is_no_text_and_any_case_of_extensions(tmp_path):
    write(tmp_path, [("a.JPG", b"image"), ("a.json", b'\xef\xbb\xbf{"caption": "a"}')])
    assert WebDataset(str(tmp_path), USUAL)[0] == {"image": b"image", "captions": ["a"], "key": "a"}


def test_first_image_is_taken(tmp_path):
    write(tmp_path, [("a.txt", b"a"), ("a.left.webp", b"first"), ("a.jpg", b"second")])
    assert WebDataset(str(tmp_path), USUAL)[0]["image"] == b"first"


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_unicode_names(tmp_path, format):
    long = "été/" + "k" * 200
    members = sample("a") + sample(long) + sample("c")
    (tmp_path / "0.tar").write_bytes(tar_bytes(members, format=format))
    source = WebDataset(str(tmp_path), USUAL)
    assert keys(source) == ["a", long, "c"]
    assert source[1]["captions"] == [f"caption of {long}"]


def test_folders_and_names_from_the_current_one(tmp_path):
    folder = tarfile.TarInfo("./x")
    folder.type = tarfile.DIRTYPE
    write(tmp_path, [folder, *sample("./x/a"), folder, *sample("./x/b")])
    source = WebDataset(str(tmp_path), USUAL)
    assert keys(source) == ["x/a", "x/b"] and source.refused == {}


@pytest.mark.parametrize("text", ["tab\tbell\a\0 end", "a <end_of_text> b", "☕ é", "two\nlines"])
def test_captions_come_as_they_are(tmp_path, text):
    assert read_one(tmp_path, txt=f" {text}\n".encode())["captions"] == [text]


@pytest.mark.parametrize(
    "reason, parts",
    [
        ("not UTF-8", {"txt": "café".encode("latin-1")}),
        ("not UTF-8", {"txt": "café".encode("utf-16")}),
        ("not UTF-8", {"txt": None, "json": b'{"caption": "caf\xe9"}'}),
        ("not UTF-8", {"txt": None, "json": rb'{"caption": "half \ud83d"}'}),
        ("caption too long", {"txt": b"a" * 10_000_000}),
        ("caption too long", {"txt": None, "json": b'"' + b"a" * 10_000_000 + b'"'}),
        ("no caption", {"txt": b""}),
        ("no caption", {"txt": b" \n", "json": b"bad, but not needed"}),
        ("no caption", {"txt": None, "json": None}),
        ("no caption", {"txt": None, "json": b"{}"}),
        ("bad JSON", {"txt": None, "json": b""}),
        ("bad JSON", {"txt": None, "json": b"[1]"}),
        ("bad JSON", {"txt": None, "json": b"[" * 100_000}),
        ("bad JSON", {"txt": None, "json": b'{"caption": 3}'}),
        ("bad JSON", {"txt": None, "json": b'{"caption": ["a", {}]}'}),
    ],
)
def test_captions_that_cannot_be_used(tmp_path, reason, parts):
    assert bad_reason(tmp_path, **parts) == reason


@pytest.mark.parametrize(
    "reason, columns",
    [
        ("no image", Columns(image="png")),
        ("no caption", Columns(captions=("caption",))),
        ("no synthetic caption", Columns(synthetic=("json.synthetic",))),
        ("no key", Columns(key="json.key")),
    ],
)
def test_columns_that_a_sample_lacks(tmp_path, reason, columns):
    assert bad_reason(tmp_path, columns) == reason


def test_other_records_do_not_suffer(tmp_path):
    write(tmp_path, sample("a", txt=b"\xff") + sample("b"))
    source = WebDataset(str(tmp_path), USUAL)
    with pytest.raises(BadRecord):
        source[0]
    assert source[1]["key"] == "b"
    assert source.locate(0).endswith("00000.tar: a")


@pytest.mark.parametrize("columns", [Columns(label="cls"), Columns(key="txt")])
def test_columns_that_make_no_sense(tmp_path, columns):
    write(tmp_path, sample("a"))
    with pytest.raises(ValueError, match="config.data.columns"):
        WebDataset(str(tmp_path), columns)


def test_image_of_no_bytes_is_for_the_decoder_to_refuse(tmp_path):
    write(tmp_path, sample("a", jpg=b"") + sample("b"))
    source = WebDataset(str(tmp_path), USUAL)
    assert source[0]["image"] == b"" and source[1]["key"] == "b"


def test_large_images(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "MAX_IMAGE_BYTES", 1000)
    assert bad_reason(tmp_path, jpg=b"." * 1001) == "file too large"
    monkeypatch.setattr(tar_index, "MAX_SAMPLE_BYTES", 4096)
    (tmp_path / "b").mkdir()
    write(tmp_path / "b", sample("a", jpg=b"." * 4000) + sample("b"))
    source = WebDataset(str(tmp_path / "b"), USUAL)
    assert keys(source) == ["b"] and counts(source) == {"file too large": 1}


# What is left out -------------------------------------------------------------------------------


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "reason, members",
    [
        ("unsafe name", [("/etc/a.jpg", b"")]),
        ("unsafe name", [("../a.jpg", b"")]),
        ("unsafe name", [("x/../../a.jpg", b"")]),
        ("not a file", [special("s.jpg", tarfile.SYMTYPE)]),
        ("not a file", [special("s.jpg", tarfile.LNKTYPE)]),
        ("not a file", [special("s.jpg", tarfile.CHRTYPE)]),
        ("not a file", [special("s.jpg", tarfile.FIFOTYPE)]),
        ("no key and extension", [("README", b"")]),
        ("no key and extension", [("x/.hidden.jpg", b"")]),
        ("no image", [("n.txt", b"n")]),
        ("duplicate key", sample("a", txt=b"again")),
        ("not UTF-8", [("caf\udce9.jpg", b"")]),
    ],
)
def test_members_that_are_left_out(tmp_path, caplog, reason, members):
    write(tmp_path, sample("a") + sample("b") + members + sample("c"))
    source = WebDataset(str(tmp_path), USUAL)
    assert keys(source) == ["a", "b", "c"]
    assert source[0]["captions"] == ["caption of a"]
    assert counts(source) == {reason: 1}
    assert reason in caplog.text and f"{tmp_path}/00000.tar" in caplog.text


def test_nul_in_a_name(tmp_path):
    info = tarfile.TarInfo("x.jpg")
    info.pax_headers = {"path": "x\0y.jpg"}
    write(tmp_path, [*sample("a"), info])
    assert counts(WebDataset(str(tmp_path), USUAL)) == {"unsafe name": 1}


def test_member_that_a_sample_has_twice(tmp_path):
    members = sample("a")
    write(tmp_path, [*members, ("a.txt", b"second"), special("a.png", tarfile.SYMTYPE)])
    source = WebDataset(str(tmp_path), Columns(captions=("txt",)))
    assert source[0]["captions"] == ["caption of a"]
    assert counts(source) == {"duplicate key": 1, "not a file": 1}
    with pytest.raises(BadRecord, match="no image"):
        WebDataset(str(tmp_path), Columns(image="png"))[0]


def test_keys_are_compared_within_a_tar_and_can_be_compared_across(tmp_path):
    write(tmp_path, sample("a") + sample("b"), sample("b") + sample("c"))
    source = WebDataset(str(tmp_path), USUAL)
    assert keys(source) == ["a", "b", "b", "c"]
    hashes = source.key_hashes()
    assert hashes.dtype == np.uint64 and hashes[1] == hashes[2]
    assert len(np.unique(hashes)) == 3 and hashes[0] == key_hash("a")


def header_of(data: bytes, name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(name).offset


def negative_size(data: bytes, at: int) -> bytes:
    info = tarfile.TarInfo.frombuf(data[at : at + 512], "utf-8", "strict")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (-1024).to_bytes(12, "big", signed=True)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return data[:at] + bytes(block) + data[at + 512 :]


DAMAGES = {
    "cut in a header": lambda data, at: data[: at + 100],
    "cut in the data": lambda data, at: data[: at + 600],
    "cut in the padding": lambda data, at: data[: at + 512 + 500],
    "damaged header": lambda data, at: data[: at + 3] + b"?" + data[at + 4 :],
    "a hole": lambda data, at: data[:at] + bytes(4096) + data[at + 4096 :],
    "negative size": negative_size,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("member", ["c.jpg", "c.txt"])
def test_damaged_tar_is_used_as_far_as_it_is_whole(tmp_path, caplog, damage, member):
    data = tar_bytes(sample("a") + sample("b") + sample("c") + sample("d") * 3)
    (tmp_path / "0.tar").write_bytes(DAMAGES[damage](data, header_of(data, member)))
    write(tmp_path, sample("e"), first=1)
    source = WebDataset(str(tmp_path), USUAL)
    assert keys(source) == ["a", "b", "e"]
    assert counts(source) == {"damaged shard": 1}
    assert f"{tmp_path}/0.tar" in caplog.text


def test_extended_header_that_claims_any_size(tmp_path):
    # 64 PAX headers, each of the next, would be read one inside of the other; and one of 1 GB.
    info = tarfile.TarInfo("c.jpg")
    info.pax_headers = {"comment": "x" * 1000}
    nested = info.tobuf()[:1536] * 64
    huge = bytearray(nested[:512])
    huge[124:136] = b"%011o\0" % 10**9
    huge[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(huge))[0]
    whole = tar_bytes(sample("a") + sample("b"))[: 512 * 12]
    for number, header in enumerate([nested, bytes(huge)]):
        (tmp_path / f"{number}.tar").write_bytes(whole + header + bytes(2**20))
    source = WebDataset(str(tmp_path), USUAL)
    assert keys(source) == ["a", "b"] * 2 and counts(source) == {"damaged shard": 2}


def test_shards_that_are_none(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "2.tar").write_bytes(bytes(10240))  # a tar without members
    write(tmp_path, sample("a"), first=3)
    source = WebDataset(str(tmp_path), USUAL)
    assert keys(source) == ["a"] and counts(source) == {"damaged shard": 2}


@pytest.mark.parametrize("seed", range(50))
def test_any_byte_may_be_damaged(tmp_path, seed):
    data = bytearray(tar_bytes(sample("a") + sample("é/" + "k" * 200) + sample("c")))
    rng = np.random.default_rng(seed)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 512)  # [blocks, 512]
    headers = np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1))
    for header in rng.choice(headers, 3) * 512:
        place = header + rng.choice([rng.integers(100), 124 + rng.integers(12), 156])
        data[place] = rng.choice(list(b"0123456789xgLKSXAD/.\0\xff"))
        checksum = tarfile.calc_chksums(bytes(data[header : header + 512]))[0]
        data[header + 148 : header + 156] = b"%06o\0 " % checksum
    (tmp_path / "0.tar").write_bytes(data)
    write(tmp_path, sample("z"), first=1)
    source = WebDataset(str(tmp_path), USUAL)
    for index in range(len(source) - 1):
        with contextlib.suppress(BadRecord):
            assert source[index]["captions"]
    assert source[len(source) - 1]["key"] == "z"


@pytest.mark.parametrize("data", [b"", b"no tar" * 1000, tar_bytes([("a.txt", b"a")])])
def test_no_record_at_all(tmp_path, data):
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match="no sample with an image"):
        WebDataset(str(tmp_path), USUAL)


def test_no_shard_at_all(tmp_path):
    for pattern in ("*.tar", "{0..3}.tar", "missing", ""):
        with pytest.raises(ValueError, match="matches nothing"):
            WebDataset(str(tmp_path / pattern), USUAL)


# Sets of CLIP_benchmark -------------------------------------------------------------------------


def labeled(key: str, label: bytes | None, **more: bytes) -> list[tuple[str, bytes]]:
    """KEY.webp and KEY.cls."""
    parts = {"webp": b"image of " + key.encode(), "cls": label} | more
    return [(f"{key}.{extension}", data) for extension, data in parts.items() if data is not None]


def write_classes(root: Path, names="cat\ngrey_wolf\nfox\n", **splits) -> None:
    (root / "classnames.txt").write_text(names)
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    for split, members in splits.items():
        (root / split).mkdir()
        (root / split / "nshards.txt").write_text("1")
        (root / split / "0.tar").write_bytes(tar_bytes(members))


def test_classes(tmp_path):
    train = labeled("s0000000", b"2") + labeled("s0000001", b"0")
    test = labeled("s0000000", b"1") + labeled("s0000001", b"2\n", txt=b"its own caption")
    test += labeled("s0000002", b"0", json=b'{"caption": "in JSON"}')
    test += labeled("s0000003", b"0", json=b'{"caption": null}')
    write_classes(tmp_path, train=train, test=test)
    source = open_source(str(tmp_path), "test")
    assert source.class_names == ("cat", "grey_wolf", "fox") and len(source) == 4
    assert source[0] == {
        "image": b"image of s0000000",
        "captions": ["a photo of a grey wolf."],
        "key": "s0000000",
        "label": 1,
    }
    assert [source[n]["label"] for n in range(4)] == [1, 2, 0, 0]
    assert [source[n]["captions"] for n in range(1, 4)] == [
        ["its own caption"],
        ["in JSON"],
        ["a photo of a cat."],
    ]
    assert [open_source(str(tmp_path), "train[1:]")[0]["label"]] == [0]
    assert pickle.loads(pickle.dumps(source))[1]["label"] == 2
    for name in ("train", "train/0.tar", "{test,train}/*.tar"):  # named without the split
        assert open_source(str(tmp_path / name), "all").class_names == source.class_names
    with pytest.raises(ValueError, match=r"no folder 'val'.*'test', 'train'"):
        open_source(str(tmp_path), "val")


def test_labels_of_other_names(tmp_path):
    write_classes(tmp_path, test=labeled("a", None, idx=b"2", json=b'{"class": 1}'))
    shards = str(tmp_path / "test")
    assert WebDataset(shards, Columns(label=".idx"))[0]["label"] == 2
    assert WebDataset(shards, Columns(label="json.class"))[0]["label"] == 1


@pytest.mark.parametrize("label", [None, b"", b"3", b"-1", b"1.0", b"cat", "²".encode(), b"9" * 99])
def test_labels_that_cannot_be_used(tmp_path, label):
    write_classes(tmp_path, test=labeled("a", label) + labeled("b", b"0"))
    source = open_source(str(tmp_path), "test")
    with pytest.raises(BadRecord, match="no label.*expected a number below 3"):
        source[0]
    assert source[1]["label"] == 0


def test_labels_need_the_names_of_the_classes(tmp_path):
    write(tmp_path, labeled("a", b"0", txt=b"a"))
    assert "label" not in WebDataset(str(tmp_path), USUAL)[0]
    with pytest.raises(ValueError, match="columns.label='cls': no classnames.txt is beside"):
        WebDataset(str(tmp_path), Columns(label="cls"))


@pytest.mark.parametrize(
    "names, words",
    [
        (b"cat\n\nfox\n", "classnames.txt: line 2 is blank"),
        (b"", "line 1 is blank"),
        (b"\ncat\n", "line 1 is blank"),
        (b"caf\xe9\n", "is not UTF-8"),
        (b"cat\n" * 100, "more than 99 bytes"),
    ],
)
def test_names_of_classes_that_cannot_be_used(tmp_path, monkeypatch, names, words):
    monkeypatch.setattr(webdataset, "MAX_NOTE_BYTES", 99)
    write_classes(tmp_path, test=labeled("a", b"0"))
    (tmp_path / "classnames.txt").write_bytes(names)
    with pytest.raises(ValueError, match=words):
        open_source(str(tmp_path), "test")


def test_names_of_classes_with_the_line_ends_of_windows(tmp_path):
    write_classes(tmp_path, test=labeled("a", b"1"))
    (tmp_path / "classnames.txt").write_bytes("\ufeffcat\r\ncaf\u00e9\r\n".encode())
    assert open_source(str(tmp_path), "test").class_names == ("cat", "café")


def test_retrieval_has_a_caption_a_line(tmp_path):
    (tmp_path / "test").mkdir()
    write(tmp_path / "test", sample("a", txt=b"one\r\n two\n\nthree\n") + sample("b", txt=b"\n"))
    assert open_source(str(tmp_path), "test")[0]["captions"] == ["one\r\n two\n\nthree"]
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    source = open_source(str(tmp_path), "test")
    assert source[0]["captions"] == ["one", "two", "three"] and source.class_names == ()
    with pytest.raises(BadRecord, match="no caption"):
        source[1]


# The index --------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".bin", ".json")}


def no_scan(monkeypatch) -> None:
    def scan(tar, size):
        raise AssertionError(f"{tar} is indexed in this process")

    monkeypatch.setattr(tar_index, "scan", scan)


def test_opening_again_reads_no_tar(tmp_path, monkeypatch):
    write(tmp_path, sample("a") + sample("b", txt=b""), sample("c"))
    first = WebDataset(str(tmp_path), USUAL)
    no_scan(monkeypatch)
    again = WebDataset(str(tmp_path), USUAL)
    for index in (0, 2):
        assert again[index] == first[index]
    assert WebDataset(str(tmp_path), Columns(captions=("json.caption",)))[2]["captions"] == [
        "json of c"
    ]


def test_copies_for_other_processes_and_many_threads(tmp_path):
    write(tmp_path, *([m for n in range(20) for m in sample(f"{s}-{n}")] for s in range(3)))
    source = WebDataset(str(tmp_path), USUAL)
    expected = [source[index] for index in range(60)]
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(copy.__getitem__, list(range(60)) * 10)) == expected * 10


def test_any_number_of_processes_makes_the_same_index(tmp_path, monkeypatch):
    write(tmp_path, *(sample(f"{n}") + sample("../x") * (n % 2) for n in range(8)))
    for number in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda number=number: number)
        WebDataset(str(tmp_path), USUAL, cache=str(tmp_path / f"cache{number}" / "deep" / "er"))
        no_scan(monkeypatch)
    folders = [tmp_path / f"cache{number}" / "deep" / "er" for number in (1, 2)]
    assert contents(folders[0]) == contents(folders[1])
    assert len(contents(folders[0])) == 2


def test_build_that_was_stopped_continues(tmp_path, monkeypatch):
    write(tmp_path, *(sample(f"{n}") for n in range(5)))
    scan, scanned = tar_index.scan, []

    def stopping(tar, size):
        if len(scanned) == 3:
            raise KeyboardInterrupt
        scanned.append(tar)
        return scan(tar, size)

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(tar_index, "scan", stopping)
    with pytest.raises(KeyboardInterrupt):
        WebDataset(str(tmp_path), USUAL)
    # What a process that was killed leaves behind, of now and of days ago.
    folder = tmp_path / ".declip_index"
    for name in ("new.declip_tmp", "old.declip_tmp", "old.tmp"):
        (folder / name).write_bytes(b"half")
    for name in ("old.declip_tmp", "old.tmp"):
        os.utime(folder / name, (0, 0))
    rest = []
    monkeypatch.setattr(tar_index, "scan", lambda *tar: (rest.append(tar[0]), scan(*tar))[1])
    source = WebDataset(str(tmp_path), USUAL)
    assert sorted(rest + scanned) == [f"{tmp_path}/0000{n}.tar" for n in range(5)]
    assert keys(source) == list("01234")
    assert {p.name for p in folder.glob("*tmp")} == {"new.declip_tmp", "old.tmp"}


def test_index_is_whole_or_not_there(tmp_path, monkeypatch):
    write(tmp_path, sample("a"))

    def full(tars, files, table):
        with tar_index._written(table.with_suffix(".bin")) as stream:
            stream.write(b"half of it")
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_merge", full)
        with pytest.raises(OSError, match="disk full"):
            WebDataset(str(tmp_path), USUAL)
    assert [p.suffix for p in (tmp_path / ".declip_index").iterdir()] == [".npz"]
    assert keys(WebDataset(str(tmp_path), USUAL)) == ["a"]


def test_file_system_without_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    write(tmp_path, sample("a"))
    assert keys(WebDataset(str(tmp_path), USUAL)) == ["a"]


@pytest.mark.parametrize("suffix", [".bin", ".json", ".npz"])
@pytest.mark.parametrize("left", [0, 20])
def test_damaged_index_is_made_anew(tmp_path, suffix, left):
    write(tmp_path, sample("a"), sample("b"))
    before = WebDataset(str(tmp_path), USUAL)
    folder = tmp_path / ".declip_index"
    for path in folder.glob("*" + suffix):
        path.write_bytes(path.read_bytes()[:left])
    if suffix == ".npz":  # which is only read when the index is put together
        next(folder.glob("*.json")).unlink()
        next(folder.glob("*.bin")).unlink()
    source = WebDataset(str(tmp_path), USUAL)
    assert [source[i] for i in range(2)] == [before[i] for i in range(2)]


def test_indices_of_earlier_versions_are_removed(tmp_path):
    write(tmp_path, sample("a"), sample("b"))
    WebDataset(str(tmp_path), USUAL)
    part = WebDataset(str(tmp_path / "00000.tar"), USUAL)
    for version in range(3):
        write(tmp_path, sample("b" * (version + 2)), first=1)
        source = WebDataset(str(tmp_path), USUAL)
    files = sorted(p.suffix for p in (tmp_path / ".declip_index").iterdir())
    assert files == [".bin", ".bin", ".json", ".json", ".npz", ".npz"]  # also that of the part
    assert keys(source) == ["a", "bbbb"] and keys(part) == ["a"]


def test_layout_tells_of_changes_but_not_of_copies(tmp_path):
    write(tmp_path, sample("a"), sample("b") + sample("c"))
    layout = WebDataset(str(tmp_path), USUAL).layout()
    os.utime(tmp_path / "00000.tar", (0, 0))
    assert WebDataset(str(tmp_path), USUAL).layout() == layout
    write(tmp_path, sample("a") + sample("b"), sample("c"))  # as many records
    assert WebDataset(str(tmp_path), USUAL).layout() != layout


def test_names_of_columns_may_have_dots_and_capitals(tmp_path):
    columns = Columns(image="JPG", captions=(".txt",))
    assert read_one(tmp_path, columns)["captions"] == ["caption of a"]


def test_changed_tar_is_indexed_anew(tmp_path, monkeypatch):
    write(tmp_path, sample("a"), sample("b"), sample("c"))
    WebDataset(str(tmp_path), USUAL)
    before = {p.name for p in (tmp_path / ".declip_index").glob("*.npz")}
    write(tmp_path, sample("x") + sample("b"), first=1)
    scan, scanned = tar_index.scan, []
    monkeypatch.setattr(tar_index, "scan", lambda *tar: (scanned.append(tar[0]), scan(*tar))[1])
    assert keys(WebDataset(str(tmp_path), USUAL)) == ["a", "x", "b", "c"]
    assert scanned == [f"{tmp_path}/00001.tar"]
    after = {p.name for p in (tmp_path / ".declip_index").glob("*.npz")}
    assert len(after) == 3 and len(before & after) == 2


def test_same_size_but_another_time(tmp_path):
    write(tmp_path, sample("a") + sample("b"))
    WebDataset(str(tmp_path), USUAL)
    write(tmp_path, sample("b") + sample("a"))
    later = time.time() + 10
    os.utime(tmp_path / "00000.tar", (later, later))
    assert keys(WebDataset(str(tmp_path), USUAL)) == ["b", "a"]


@pytest.mark.parametrize(
    "change",
    {
        "other samples": lambda data: tar_bytes(sample("x") + sample("y")),
        "shorter": lambda data: data[: len(tar_bytes(sample("a"))) // 2],
        "other bytes": lambda data: b"?" * len(data),
        "zeros": lambda data: bytes(len(data)),
        "cut in a record": lambda data: data[: header_of(data, "b.json")],
        "emptied": lambda data: b"",
    }.items(),
    ids=lambda item: item[0],
)
def test_tar_that_changes_while_it_is_open(tmp_path, change):
    data = tar_bytes(sample("a") + sample("b"))
    tar = tmp_path / "0.tar"
    tar.write_bytes(data)
    source = WebDataset(str(tmp_path), USUAL)
    tar.write_bytes(change[1](data))
    with pytest.raises(BadRecord) as error:
        source[1]
    assert error.value.reason == "shard changed" and str(tar) in error.value.detail
    assert source.locate(1) == f"{tar}: record 1"


def test_tar_that_is_gone_is_no_bad_record(tmp_path):
    write(tmp_path, sample("a"))
    source = WebDataset(str(tmp_path), USUAL)
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(FileNotFoundError):
        source[0]


def test_shards_can_move_with_their_index(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    write(tmp_path / "here", sample("a"))
    WebDataset(str(tmp_path / "here"), USUAL)
    (tmp_path / "here").rename(tmp_path / "there")
    no_scan(monkeypatch)
    assert keys(WebDataset(str(tmp_path / "there"), USUAL)) == ["a"]


def test_shards_of_the_same_name_in_one_cache(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name, sample(name))
        os.utime(tmp_path / name / "00000.tar", (0, 0))
    cache = str(tmp_path / "cache")
    assert keys(WebDataset(str(tmp_path / "{a,b}/*.tar"), USUAL, cache)) == ["a", "b"]
    assert keys(WebDataset(str(tmp_path / "b"), USUAL, cache)) == ["b"]
    assert len(list(Path(cache).glob("*.npz"))) == 2


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    shards, home = tmp_path / "shards", tmp_path / "home"
    shards.mkdir()
    write(shards, sample("a"))
    (shards / ".declip_index").write_text("in the way")  # permissions do not stop root
    with pytest.raises(ValueError, match="config.data.index_cache"):
        WebDataset(str(shards), USUAL, cache=str(shards / ".declip_index"))
    with pytest.raises(ValueError, match="local"):
        WebDataset(str(shards), USUAL, cache="memory://cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert keys(WebDataset(str(shards), USUAL)) == ["a"]
    assert len(contents(home / "declip_jax")) == 2


def test_read_only_shards_with_the_index_of_somebody_else(tmp_path, monkeypatch):
    write(tmp_path, sample("a"))
    WebDataset(str(tmp_path), USUAL)

    def read_only(dir):
        raise PermissionError(f"{dir} is read-only")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert keys(WebDataset(str(tmp_path), USUAL)) == ["a"]
    write(tmp_path, sample("b") + sample("c"))
    with pytest.raises(ValueError, match="read-only.*config.data.index_cache"):
        WebDataset(str(tmp_path), USUAL)


def test_object_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs = fsspec.filesystem("memory")
    try:
        for number in range(3):
            data = tar_bytes(sample(f"{number}"))
            fs.pipe_file(f"/webdataset/{number}.tar", data[:-1000] if number == 2 else data)
        source = WebDataset("memory://webdataset/{0..2}.tar", USUAL)
        assert keys(source) == ["0", "1", "2"]
        assert source.locate(1) == "memory:///webdataset/1.tar: 1"
        assert len(contents(tmp_path / "declip_jax")) == 2
        fs.pipe_file("/webdataset/1.tar", tar_bytes(sample("x")))
        with pytest.raises(BadRecord, match="shard changed"):
            source[1]
        assert keys(WebDataset("memory://webdataset", USUAL)) == ["0", "x", "2"]
    finally:
        fs.rm("/webdataset", recursive=True)


def test_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    write(tmp_path, *(sample(f"{n}") * (n % 7 > 0) for n in range(100)))
    source = WebDataset(str(tmp_path), USUAL)
    assert keys(source) == [str(n) for n in range(100) if n % 7]
    assert source.locate(len(source) - 1) == f"{tmp_path}/00099.tar: 99"


def test_shard_that_is_too_large(tmp_path):
    with open(tmp_path / "0.tar", "wb") as stream:
        stream.truncate(tar_index.MAX_TAR_BYTES + 1)
    with pytest.raises(ValueError, match="0.tar has"):
        WebDataset(str(tmp_path), USUAL)
