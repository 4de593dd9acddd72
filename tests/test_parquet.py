import errno
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax.data import input_files
from declip_jax.data.options import Columns
from declip_jax.data.records import BadRecord
from declip_jax.data.sources import parquet
from declip_jax.data.sources.parquet import Parquet

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = ("cat", "dog")
USUAL = Columns()


def image(index: int) -> bytes:
    return np.random.default_rng(index).bytes(200)


def columns(rows) -> dict[str, pa.Array]:
    """As the datasets library lays them out."""
    images = [{"bytes": image(i), "path": f"{i}.jpg"} for i in rows]
    return {
        "image": pa.array(images, IMAGE),
        "captions": pa.array([[f"caption {i}", f"é {i}"] for i in rows], pa.list_(pa.string())),
        "width": pa.array(range(len(rows)), pa.int32()),
    }


def write(path, fields: dict, notes: dict | None = None, **options) -> str:
    table = pa.table(fields)
    if notes:
        features = {"info": {"features": notes}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, **({"row_group_size": 4} | options))
    return str(path)


def write_files(folder) -> list[dict]:
    """Three files of 10 rows, in row groups of 4, 4 and 2; their records."""
    for number in range(3):
        rows = range(10 * number, 10 * number + 10)
        write(folder / f"train-{number:05d}-of-00003.parquet", columns(rows))
    return [
        {"image": image(i), "captions": [f"caption {i}", f"é {i}"], "key": f"{i}.jpg"}
        for i in range(30)
    ]


def count_reads(monkeypatch) -> list[int]:
    """The row groups that are read from here on."""
    reads, read = [], pq.ParquetFile.read_row_group

    def counted(self, number, *args, **kwargs):
        reads.append(number)
        return read(self, number, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    return reads


def test_files_and_row_groups_one_after_the_other(tmp_path):
    expected = write_files(tmp_path)
    for pattern in (tmp_path, tmp_path / "train-*.parquet", tmp_path / "train-{00000..00002}*"):
        source = Parquet(str(pattern), USUAL)
        assert len(source) == 30 and source.class_names == () and str(source) == str(pattern)
        assert [source[i] for i in range(30)] == expected
    assert source.blocks.dtype == np.int64
    assert source.blocks.tolist() == [0, 4, 8, 10, 14, 18, 20, 24, 28]
    assert source.locate(19).endswith("train-00001-of-00003.parquet: row group 2, row 1")


def test_it_can_be_pickled_after_it_was_read(tmp_path):
    expected = write_files(tmp_path)
    source = Parquet(str(tmp_path), USUAL)
    fresh = len(pickle.dumps(source))
    assert source[13] == expected[13]
    again = pickle.dumps(source)
    assert len(again) == fresh
    assert pickle.loads(again)[29] == expected[29]


def test_threads_at_random_read_what_one_reads_in_order(tmp_path):
    expected = write_files(tmp_path)
    source = Parquet(str(tmp_path), USUAL)
    order = np.random.default_rng(0).integers(30, size=600)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(source.__getitem__, order)) == [expected[i] for i in order]


def test_threads_that_want_a_row_group_read_it_once(tmp_path, monkeypatch):
    write_files(tmp_path)
    source = Parquet(str(tmp_path), USUAL)
    reads, start = count_reads(monkeypatch), threading.Barrier(16)

    def read(index):
        start.wait()
        return source[index]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, [i % 8 for i in range(16)]))
    assert sorted(reads) == [0, 1]


def test_row_groups_are_kept_as_far_as_memory_allows(tmp_path, monkeypatch):
    write_files(tmp_path)
    group = pq.read_metadata(tmp_path / "train-00002-of-00003.parquet").row_group(0)  # a large one
    size = sum(group.column(leaf).total_uncompressed_size for leaf in range(3))  # without width
    monkeypatch.setattr(parquet, "CACHE_BYTES", 5 * size)
    source = Parquet(str(tmp_path), USUAL)
    assert source.blocks_together == 2
    reads = count_reads(monkeypatch)
    for index in 3 * [4, 8, 10, 0] + [4]:  # one in each of 2 * blocks_together blocks
        source[index]
    assert len(reads) == 4
    for index in (14, 10, 0, 4):  # a fifth takes the place of 8, which was not used for longest
        source[index]
    assert len(reads) == 5
    source[8]
    assert len(reads) == 6

    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    assert Parquet(str(tmp_path), USUAL).blocks_together == 1
    monkeypatch.undo()
    assert Parquet(str(tmp_path), USUAL).blocks_together == 9


def test_only_the_columns_that_are_needed_are_read(tmp_path, monkeypatch):
    huge = pa.array([b"x" * 100_000] * 10)
    path = write(tmp_path / "a.parquet", columns(range(10)) | {"embedding": huge})
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10_000)
    assert Parquet(path, USUAL)._read(0).column_names == ["image", "captions"]


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
def test_types_of_columns(tmp_path, binary, text):
    rows = range(10)
    fields = {
        "jpg": pa.array([image(i) for i in rows], binary),
        "TEXT": pa.array([f"caption {i}" for i in rows], text),
        "templates": pa.array([f"a photo {i % 2}" for i in rows], text).dictionary_encode(),
        "more": pa.array([[f"m{i}", None, " "] for i in rows], pa.large_list(text)),
        "id": pa.array(rows, pa.uint64()),
    }
    path = write(tmp_path / "part.parquet", fields)
    assert Parquet(path, USUAL)[7] == {
        "image": image(7),
        "captions": ["caption 7"],
        "key": "part:7",
    }
    named = Columns(captions=("TEXT", "templates"), synthetic=("more",), key="id")
    assert Parquet(path, named)[7] == {
        "image": image(7),
        "captions": ["caption 7", "a photo 1"],
        "synthetic": ["m7"],
        "key": "7",
    }
    assert Parquet(path, Columns(key="TEXT"))[7]["key"] == "caption 7"


def test_keys_without_a_path(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        fields = columns(range(10))
        fields["image"] = pa.array([{"bytes": image(i), "path": "ab"[i:]} for i in range(10)])
        write(tmp_path / folder / "0.parquet", fields)
    source = Parquet(str(tmp_path / "two"), USUAL)
    assert [source[i]["key"] for i in (0, 1, 2, 9)] == ["ab", "b", "0:2", "0:9"]
    source = Parquet(str(tmp_path / "{one,two}"), USUAL)
    assert source[19]["key"] == "two/0:9"


def test_classes(tmp_path):
    notes = {"label": {"_type": "ClassLabel", "names": CLASSES}, "width": {"_type": "Value"}}
    fields = columns(range(4)) | {"label": pa.array([0, 1, None, 2])}
    path = write(tmp_path / "a.parquet", fields, notes)
    for label in ("", "label"):
        source = Parquet(path, Columns(label=label))
        assert source.class_names == CLASSES
        assert [source[i]["label"] for i in range(2)] == [0, 1]
        for index in (2, 3):
            with pytest.raises(BadRecord, match="no label.* of 2 classes"):
                source[index]
    with pytest.raises(ValueError, match="columns.label: .*a.parquet.*names.*'width'"):
        Parquet(path, Columns(label="width"))

    notes["label"]["names"] = ("dog", "cat")
    write(tmp_path / "b.parquet", fields, notes)
    with pytest.raises(ValueError, match="b.parquet and .*a.parquet have different classes"):
        Parquet(str(tmp_path), USUAL)


@pytest.mark.parametrize("notes", [b"{", b"[]", b'{"info": {"features": {"label": 3}}}', b"\xff"])
def test_notes_that_say_nothing(tmp_path, notes):
    table = pa.table(columns(range(2)) | {"label": [0, 1]})
    path = write(tmp_path / "a.parquet", {})
    pq.write_table(table.replace_schema_metadata({b"huggingface": notes}), path)
    source = Parquet(path, USUAL)
    assert source.class_names == () and "label" not in source[1]


def test_remote_files(tmp_path):
    expected = write_files(tmp_path)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path), "/remote", recursive=True)
    try:
        source = pickle.loads(pickle.dumps(Parquet("memory://remote/*.parquet", USUAL)))
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(source.__getitem__, range(30))) == expected
        assert source.locate(0).startswith("memory://")
    finally:
        fs.rm("/remote", recursive=True)


def refused(pattern, words, named=USUAL):
    with pytest.raises(ValueError, match=words) as raised:
        Parquet(str(pattern), named)
    assert not isinstance(raised.value, BadRecord) and "\n" not in str(raised.value)


def test_columns_that_are_missing_or_of_other_types(tmp_path):
    path = write(tmp_path / "a.parquet", columns(range(4)) | {"text": pa.array(range(4))})
    for field in ("image", "captions", "synthetic", "key", "label"):
        nothing = Columns(**{field: ("nothing",) if field in ("captions", "synthetic") else "no"})
        refused(path, rf"config.data.columns.{field}: {path} has no 'no.*width: int32", nothing)
    refused(path, "columns.image: .* has 'captions' as list<.*binary", Columns(image="captions"))
    refused(path, "columns.captions: .*'text' as int64.*strings", Columns(captions=("text",)))
    refused(path, "columns.synthetic: .*'image' as struct", Columns(synthetic=("image",)))
    refused(path, "columns.key: .*'image' as struct.*integers", Columns(key="image"))
    refused(path, "columns.label: .*'captions' as list.*integers", Columns(label="captions"))

    fields = columns(range(4))
    two = {"left": fields["image"], "right": fields["image"], "alt": fields["captions"]}
    path = write(tmp_path / "b.parquet", two)
    refused(path, "columns.image: .* none of the usual ones .*left: struct")
    refused(path, "columns.captions: .* none of the usual ones .*caption,", Columns(image="left"))
    assert Parquet(path, Columns(image="right", captions=("alt",)))[3]["key"] == "3.jpg"

    twice = pa.table([fields["image"], *2 * [fields["captions"]]], ["image", "alt", "alt"])
    pq.write_table(twice, tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", "no 'alt'", Columns(captions=("alt",)))


def test_files_that_differ(tmp_path):
    write_files(tmp_path)
    path = tmp_path / "train-00001-of-00003.parquet"
    write(path, columns(range(4)) | {"captions": pa.array(range(4))})
    refused(tmp_path, f"columns.captions: {path} has 'captions' as int64")
    # One caption instead of a list of them is read all the same.
    write(path, columns(range(4)) | {"captions": pa.array(["one"] * 4)})
    assert Parquet(str(tmp_path), USUAL)[10]["captions"] == ["one"]


def test_files_that_are_damaged_from_the_start(tmp_path):
    write_files(tmp_path)
    path = tmp_path / "train-00002-of-00003.parquet"
    whole = path.read_bytes()
    for content in (b"", b"x" * 1000, whole[:-1], whole[:700], whole[:-8] + bytes(4) + b"PAR1"):
        path.write_bytes(content)
        refused(tmp_path, f"{path} is not a whole Parquet file")
    refused(tmp_path / "nothing-*.parquet", "matches nothing")
    refused(write(path, columns([])), f"{path}.*no rows")


def test_row_groups_that_are_too_large(tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    refused(tmp_path, "00000-of-00003.parquet: row group 0 has .*row_group_size")


def test_files_without_rows_among_others(tmp_path):
    write(tmp_path / "0.parquet", columns([]))
    write(tmp_path / "1.parquet", columns(range(5)))
    write(tmp_path / "2.parquet", columns([]))
    source = Parquet(str(tmp_path), USUAL)
    assert source.blocks.tolist() == [0, 4] and source[4]["image"] == image(4)
    assert "1.parquet: row group 1, row 0" in source.locate(4)


def bad(source, index):
    with pytest.raises(BadRecord) as raised:
        source[index]
    return raised.value.reason


def test_damaged_pages_are_bad_records(tmp_path, monkeypatch):
    expected = write_files(tmp_path)
    path = tmp_path / "train-00000-of-00003.parquet"
    write(path, columns(range(10)), write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(image(5)) + 3] ^= 1
    path.write_bytes(content)
    source = Parquet(str(tmp_path), USUAL)
    reads = count_reads(monkeypatch)
    for _ in range(2):
        for index in range(4, 8):
            assert bad(source, index) == "unreadable record"
    assert len(reads) == 1  # however often the row group is asked for
    assert source[3] == expected[3] and source[8] == expected[8]


def test_any_flipped_bit_is_a_bad_record_or_none(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, columns(range(4)), compression="snappy")
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    reasons = set()
    for place in range(4, len(whole) - footer, 7):
        content = bytearray(whole)
        content[place] ^= 0x10
        path.write_bytes(content)
        try:
            Parquet(str(path), USUAL)[2]
        except BadRecord as error:
            reasons.add(error.reason)
        except ValueError as error:
            assert "not a whole Parquet file" in str(error)
    assert "unreadable record" in reasons


def test_errors_of_the_disk_are_no_bad_records_and_are_tried_again(tmp_path, monkeypatch):
    expected = write_files(tmp_path)
    source = Parquet(str(tmp_path), USUAL)
    path = tmp_path / "train-00000-of-00003.parquet"
    path.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        source[0]
    (tmp_path / "away").rename(path)

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read_row_group", fail)
        with pytest.raises(OSError, match="Input/output error"):
            source[0]
    assert source[0] == expected[0]


def test_a_file_that_changed_meanwhile(tmp_path):
    write_files(tmp_path)
    path = tmp_path / "train-00000-of-00003.parquet"
    opened = pickle.dumps(Parquet(str(tmp_path), USUAL))  # nothing is read yet

    def detail(index):
        with pytest.raises(BadRecord, match="unreadable record") as raised:
            pickle.loads(opened)[index]
        return raised.value.detail

    write(path, columns(range(3)))
    assert "has changed" in detail(0) and detail(9)
    write(path, {"image": columns(range(10))["image"]})
    assert "captions" in detail(0)
    path.write_bytes(b"")
    assert "0 bytes" in detail(0)


def test_records_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "MAX_IMAGE_BYTES", 1000)
    good = {"bytes": b"image", "path": "a.jpg"}
    rows = {
        "no image": [(None, ["a"]), ({"bytes": None, "path": "a.jpg"}, ["a"])],
        "file too large": [({"bytes": b"x" * 1001, "path": ""}, ["a"])],
        "no caption": [(good, None), (good, []), (good, [None]), (good, ["", " \t"])],
        "caption too long": [(good, ["x" * (1 << 20) + "x"]), (good, ["é" * 1000] * 1000)],
    }
    images, captions = zip(*[row for several in rows.values() for row in several], strict=True)
    fields = {
        "image": pa.array([*images, {"bytes": b"", "path": ""}], IMAGE),
        "captions": pa.array([*captions, ["a"]], pa.list_(pa.string())),
    }
    source = Parquet(write(tmp_path / "a.parquet", fields), USUAL)
    reasons = [reason for reason, several in rows.items() for _ in several]
    assert [bad(source, i) for i in range(len(source))] == [*reasons, "no image"]
    with pytest.raises(BadRecord, match="no image: only its path"):
        source[1]


def test_texts_that_are_not_utf8(tmp_path):
    fields = columns(range(2)) | {"captions": pa.array([b"caf\xe9", b"ok\x00"]).view(pa.string())}
    source = Parquet(write(tmp_path / "a.parquet", fields), USUAL)
    assert bad(source, 0) == "not UTF-8"
    assert source[1]["captions"] == ["ok\0"]
