"""`prepare` from webdatasets, Parquet files, TFDS data sets and its own."""

import io
import json
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax import prepare
from declip_jax.data import image
from declip_jax.data.sources.webdataset import WebDataset
from declip_jax.prepare import filters, inputs
from tests.test_prepare import contents, encoded, manifest, read, refused
from tests.test_readers import write_tfds


def run(format: str, source, output, *flags) -> int:
    arguments = [format, "--source", source, "--output", output, "--workers", 1, *flags]
    return prepare.main([str(argument) for argument in arguments])


def write_tar(path, samples: dict[str, dict[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def sample(number: int, **fields) -> dict[str, bytes]:
    fields = {"caption": f"json {number}", "uid": f"u{number}", **fields}
    text = f"text {number}".encode()
    return {"jpg": encoded(number), "txt": text, "json": json.dumps(fields).encode()}


@pytest.fixture
def tars(tmp_path):
    """Three shards of seven samples; the last two have the keys of the first."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(3):
        names = [f"{shard}{place}" for place in range(7)]
        names[5:] = ["00", "01"] if shard == 2 else names[5:]
        samples = {name: sample(7 * shard + place) for place, name in enumerate(names)}
        write_tar(folder / f"{shard}.tar", samples)
    return folder / "{0..2}.tar"


@pytest.fixture
def pairs(tmp_path):
    """Parquet files; the first row cannot be read, and two others have its key."""
    for file in range(2):
        rows = range(file * 6, file * 6 + 6)
        images = [{"bytes": encoded(n) if n else None, "path": f"{n % 9}.jpg"} for n in rows]
        captions = [[f"row {n}", "several"] for n in rows]
        pq.write_table(
            pa.table({"image": images, "caption": captions, "machine": [f"m{n}" for n in rows]}),
            tmp_path / f"pairs-{file}.parquet",
            row_group_size=4,
        )
    return tmp_path / "pairs-*.parquet"


def test_webdataset(tars, tmp_path, capsys):
    columns = ("--caption-column", "txt", "--caption-column", "json.caption")
    output = tmp_path / "out"
    assert run("webdataset", tars, output, *columns, "--synthetic-column", "json.uid") == 0
    found = read(output)
    assert len(found) == 21
    assert found[8] == {
        "image": encoded(8),
        "captions": ["text 8", "json 8"],
        "synthetic": ["u8"],
        "key": "11",
    }
    assert manifest(output)["settings"]["source"] == str(tars)
    assert "kept 21 images with 42 captions" in capsys.readouterr().out


def test_parquet(pairs, tmp_path):
    assert run("parquet", pairs, tmp_path / "out", "--synthetic-column", "machine") == 0
    found = read(tmp_path / "out")
    assert len(found) == 11
    assert found[0] == {
        "image": encoded(1),
        "captions": ["row 1", "several"],
        "synthetic": ["m1"],
        "key": "1.jpg",
    }
    assert [reason for _, reason in refused(tmp_path / "out")] == ["no image"]


def test_array_record(tmp_path):
    """What was written is written again, a part of it, with labels and synthetic captions."""
    for name in ("fox", "wolf"):
        (tmp_path / f"animals/{name}").mkdir(parents=True)
        for number in range(4):
            path = tmp_path / f"animals/{name}/{number}.jpg"
            path.write_bytes(encoded(number, ".jpg", 40, 30 + number))
    images = ["imagefolder", "--images", str(tmp_path / "animals")]
    output, first = ["--output", str(tmp_path / "one")], ["--synthetic-template", "so a {}"]
    assert prepare.main([*images, *output, *first]) == 0
    flags = ("--source-split", "train[2:]", "--short-side", 20, "--min-side", 31)
    assert run("array_record", tmp_path / "one", tmp_path / "two", *flags) == 0
    before, after = read(tmp_path / "one"), read(tmp_path / "two")
    assert [record["key"] for record in after] == [before[n]["key"] for n in (2, 3, 5, 6, 7)]
    assert after[-1] | {"image": b""} == before[-1] | {"image": b""}
    assert image.size(after[-1]["image"])[1] == 20
    assert manifest(tmp_path / "two")["settings"]["class_names"] == ["fox", "wolf"]


def test_tfds(tmp_path):
    source, flags = write_tfds(tmp_path), ("--caption-column", "texts/said", "--min-side", 16)
    assert run("tfds", source, tmp_path / "out", *flags) == 0
    found = read(tmp_path / "out")
    assert sorted(record["captions"][0] for record in found) == sorted(
        f"number {number}" for number in range(23)
    )
    assert found[0]["image"][:4] == b"\x89PNG"


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_workers_and_restarts_do_not_matter(tars, pairs, tmp_path, monkeypatch, format):
    source = {"webdataset": tars, "parquet": pairs}[format]
    flags = ("--deduplicate", "--name", "x", "--shards", 5)
    assert run(format, source, tmp_path / "one", *flags) == 0
    assert run(format, source, tmp_path / "two", *flags, "--workers", 2) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    check_image, calls = filters.check_image, 0

    def check_or_stop(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return check_image(*arguments)

    monkeypatch.setattr(filters, "check_image", check_or_stop)
    assert run(format, source, tmp_path / "three", *flags) == 130
    # The keys are not read again.
    monkeypatch.setattr(inputs, "hash_keys", lambda *_: pytest.fail("keys read again"))
    monkeypatch.setattr(np, "argsort", lambda *_, **__: pytest.fail("keys compared again"))
    assert run(format, source, tmp_path / "three", *flags) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_deduplicate(tars, pairs, tmp_path):
    assert run("webdataset", tars, tmp_path / "one", "--deduplicate") == 0
    assert refused(tmp_path / "one") == [
        (f"{tars.parent}/2.tar: 00", "duplicate key"),
        (f"{tars.parent}/2.tar: 01", "duplicate key"),
    ]
    # By a column of the user's choice, of which none is twice.
    flags = ("--deduplicate", "--key-column", "json.uid")
    assert run("webdataset", tars, tmp_path / "two", *flags) == 0
    assert [record["key"] for record in read(tmp_path / "two")] == [f"u{n}" for n in range(21)]
    # Row 0 cannot be read, so row 9 is the first with its key; 10 and 11 repeat 1 and 2.
    assert run("parquet", pairs, tmp_path / "three", "--deduplicate") == 0
    captions = [record["captions"][0] for record in read(tmp_path / "three")]
    assert captions == [f"row {number}" for number in range(1, 10)]
    assert manifest(tmp_path / "three")["refused"] == {"duplicate key": 2, "no image": 1}


def test_a_source_that_changed_in_between(tars, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(filters, "check_image", interrupt)
    assert run("webdataset", tars, tmp_path / "out") == 130
    monkeypatch.undo()
    write_tar(tars.parent / "1.tar", {str(n): sample(n) for n in range(7)})
    assert run("webdataset", tars, tmp_path / "out") == 2
    assert "input_digest was" in capsys.readouterr().err


def test_another_split_of_a_source_is_no_change(tmp_path, capsys):
    (tmp_path / "in/fox").mkdir(parents=True)
    (tmp_path / "in/fox/a.jpg").write_bytes(encoded(1))
    images = ["imagefolder", "--images", str(tmp_path / "in"), "--output", str(tmp_path / "one")]
    assert prepare.main(images) == 0
    assert run("array_record", tmp_path / "one", tmp_path / "two") == 0
    assert prepare.main([*images, "--split", "test"]) == 0
    assert run("array_record", tmp_path / "one", tmp_path / "two") == 0
    assert "already complete" in capsys.readouterr().out


def test_shards_as_attackers_write_them(tmp_path, capsys):
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\0\xff\xff" * 2 + b"\x08\x02\0\0\0" + b"\0" * 4
    write_tar(
        tmp_path / "0.tar",
        {
            "good": sample(1) | {"txt": b"rings \x07 <end_of_text>"},
            "../up": sample(2),
            "/root": sample(3),
            "empty": sample(4) | {"jpg": b""},
            "bomb": sample(5) | {"jpg": bomb},
            "long": sample(6) | {"txt": b"x" * 10_000_000},
            "mixed": sample(7) | {"txt": "naïve".encode("latin-1")},
            "cut": sample(8) | {"jpg": encoded(8)[:-50]},
            "blank": sample(9) | {"txt": b" \n"},
        },
    )
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(encoded(number))
            tar.addfile(member, io.BytesIO(encoded(number)))
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"some"))
    (tmp_path / "1.tar").write_bytes(whole.getvalue()[: whole.tell() // 4])  # in the first image
    flags = ("--workers", 2, "--shards", 3)
    assert run("webdataset", tmp_path / "{0,1}.tar", tmp_path / "out", *flags) == 0
    (record,) = read(tmp_path / "out")
    assert record["captions"] == ["rings \x07 <end_of_text>"]
    counts = manifest(tmp_path / "out")["refused"]
    assert counts["unreadable image"] == 2 and counts["too many pixels"] == 1
    assert counts["caption too long"] == counts["not UTF-8"] == counts["no caption"] == 1
    assert counts["unsafe name"] >= 2 and counts["damaged shard"] == 1
    printed = capsys.readouterr().out
    assert "kept 1 images" in printed and "damaged shard" in printed


def test_results_are_written_to_file_systems_only(tars, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("webdataset", tars, "s3://bucket/out") == 2
    assert "--output s3://bucket/out: must be on a local" in capsys.readouterr().err
    assert not (tmp_path / "s3:").exists()


def test_a_wrong_column_is_found_without_reading_everything(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "0.tar", {f"{n:03}": sample(n) for n in range(50)})
    read_one, calls = WebDataset.__getitem__, []
    monkeypatch.setattr(
        WebDataset, "__getitem__", lambda self, i: calls.append(i) or read_one(self, i)
    )
    flags = ("--caption-column", "caption")
    assert run("webdataset", tmp_path / "0.tar", tmp_path / "out", *flags) == 2
    assert "nothing in caption; the sample has" in capsys.readouterr().err
    assert len(calls) == 60  # ten to look whether there are synthetic captions


def test_sources_that_cannot_be(tars, pairs, tmp_path, capsys):
    pq.write_table(pa.table({"image": [1.5], "caption": ["x"]}), tmp_path / "odd.parquet")
    write_tar(tmp_path / "cut.tar", {"0": sample(0) | {"jpg": b"cut"}})
    for message, *arguments in [
        ("matches nothing", "webdataset", tmp_path / "{0..3}.tar"),
        ("--source .*nowhere", "array_record", tmp_path / "nowhere"),
        ("--source .*image", "parquet", tmp_path / "odd.parquet"),
        ("'unreadable image': 1", "webdataset", tmp_path / "cut.tar"),
        ("tfds:", "tfds", "tfds:there_is_no_such_set"),
        ("for this the command is webdataset", "parquet", tars),
        ("for this the command is array_record", "tfds", "scenes"),
    ]:
        assert run(*arguments, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert "Traceback" not in error and error.count("\n") <= 2
