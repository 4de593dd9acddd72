"""`prepare captions`: a second column of captions, from a model or from a file."""

import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax import prepare
from declip_jax.prepare import captions
from tests.test_prepare import contents, csv_flags, encoded, make_photos, manifest, read, refused
from tests.test_prepare import run as run_listed


@pytest.fixture
def birds(tmp_path):
    """A prepared data set of 20 images, "00.png", "01.webp", …"""
    photos = make_photos(tmp_path)
    assert run_listed("csv", photos, tmp_path / "birds", *csv_flags(photos)) == 0
    return tmp_path / "birds"


def run(source, output, *flags) -> int:
    arguments = ["captions", "--source", source, "--output", output, "--workers", 1, *flags]
    return prepare.main([str(argument) for argument in arguments])


# From a file

ROWS = [
    ("00.png", "a red bird"),
    ("02.jpg", "a bird, flying"),
    ("nowhere.png", "no bird"),
    ("00.png", "a bird"),
    ("nowhere.png", "not one"),
    ("03.png", " "),
]


def write_rows(folder, kind: str, rows=ROWS, names=("key", "caption")):
    path = folder / f"machine.{kind}"
    if kind == "csv":
        lines = [f'"{key}","{caption}"' for key, caption in rows]
        path.write_text("\n".join([",".join(names), *lines]))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    else:
        pq.write_table(
            pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), path, row_group_size=2
        )
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_join(birds, tmp_path, capsys, kind):
    assert run(birds, tmp_path / "out", "--from", write_rows(tmp_path, kind)) == 0
    before = {record["key"]: record for record in read(birds)}
    assert read(tmp_path / "out") == [
        before["00.png"] | {"synthetic": ["a red bird", "a bird"]},
        before["02.jpg"] | {"synthetic": ["a bird, flying"]},
    ]
    counts = manifest(tmp_path / "out")
    assert counts["refused"] == {"no synthetic caption": 18, "empty caption": 1}
    assert counts["unused_keys"] == 1
    assert "keys of --from that no record has: 1" in capsys.readouterr().out


def test_join_fields_and_split(birds, tmp_path):
    path = write_rows(tmp_path, "jsonl", names=("file", "text"))
    flags = ("--key-field", "file", "--caption-field", "text", "--source-split", "train[:1]")
    assert run(birds, tmp_path / "out", "--from", path, *flags, "--split", "test") == 0
    assert len(read(tmp_path / "out", "test")) == 1
    assert manifest(tmp_path / "out", "test")["unused_keys"] == 2


def test_join_continues(birds, tmp_path, monkeypatch):
    path, flags = write_rows(tmp_path, "csv"), ("--name", "x")
    assert run(birds, tmp_path / "whole", "--from", path, *flags, "--workers", 2) == 0

    read_one, calls = captions.Joined.read, 0

    def read_or_stop(*arguments):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return read_one(*arguments)

    monkeypatch.setattr(captions.Joined, "read", read_or_stop)
    assert run(birds, tmp_path / "out", "--from", path, *flags) == 130
    monkeypatch.setattr(captions, "read_rows", lambda *_: pytest.fail("read again"))
    assert run(birds, tmp_path / "out", "--from", path, *flags) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_join_with_rows_that_cannot_be_used(birds, tmp_path):
    rows = [
        b"00.png,kept",
        b"01.webp,caf\xe9",
        b"02.jpg",
        b",nameless",
        b'03.png,"' + b"x" * 2_000_000 + b'"',
        b"04.webp,also kept <end_of_text>\x07",
    ]
    path = tmp_path / "machine.csv"
    path.write_bytes(b"key,caption\n" + b"\n".join(rows))
    assert run(birds, tmp_path / "out", "--from", path) == 0
    assert [record["synthetic"] for record in read(tmp_path / "out")] == [
        ["kept"],
        ["also kept <end_of_text>\x07"],
    ]
    lines = [entry for entry in refused(tmp_path / "out") if entry[0].startswith("line")]
    assert sorted(lines) == [
        ("line 3", "not UTF-8"),
        ("line 4", "bad row"),
        ("line 5", "bad row"),
        ("lines 6-6", "bad row"),
    ]
    table = pa.table({"key": ["00.png", None, "02.jpg"], "caption": ["kept", "x", "y" * 2_000_000]})
    pq.write_table(table, tmp_path / "machine.parquet")
    assert run(birds, tmp_path / "two", "--from", tmp_path / "machine.parquet") == 0
    counts = manifest(tmp_path / "two")["refused"]
    assert counts == {"no synthetic caption": 19, "bad row": 1, "caption too long": 1}


def test_joins_that_cannot_be(birds, tmp_path, capsys):
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"key": [1, 2], "caption": ["x", "y"]}), numbers)
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    (tmp_path / "rows.txt").write_text("")
    other = write_rows(tmp_path, "csv", [("30.png", "x")])
    named = write_rows(tmp_path, "parquet", names=("image", "caption"))
    for message, path in [
        ("no such file", tmp_path / "nowhere.csv"),
        ("must end in .csv, .jsonl or .parquet", tmp_path / "rows.txt"),
        ("not a whole Parquet file", tmp_path / "no.parquet"),
        ("'key' holds int64, expected texts", numbers),
        ("no column 'key' among ['image', 'caption']; name the right one with --key-field", named),
        ("'no synthetic caption': 20", other),
    ]:
        assert run(birds, tmp_path / "out", "--from", path) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    # A failed attempt leaves nothing behind that would stop a better one.
    assert run(birds, tmp_path / "out", "--from", write_rows(tmp_path, "jsonl")) == 0


def test_one_of_model_and_file(birds, tmp_path, capsys):
    for flags in ((), ("--model", "x", "--from", "y.csv")):
        with pytest.raises(SystemExit) as exit:
            run(birds, tmp_path / "out", *flags)
        assert exit.value.code == 2
    assert "--model" in capsys.readouterr().err


# From a model


class Captioner:
    """Says how large each image is, and what it was made with; nothing of images 25 wide."""

    batches: list[int] = []

    def __init__(self, model, device, max_new_tokens, prompt):
        if model == "nowhere":
            raise ValueError("no such model")
        self.text = f"{prompt} {model} {device} {max_new_tokens}"

    def __call__(self, images: list[np.ndarray]) -> list[str]:
        assert images and all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
        Captioner.batches.append(len(images))
        return ["" if i.shape[1] == 25 else f" {self.text} {i.shape[:2]}\n" for i in images]


@pytest.fixture
def model(monkeypatch):
    module = types.ModuleType("declip_jax.prepare.captioner")
    module.Captioner = Captioner
    monkeypatch.setitem(sys.modules, "declip_jax.prepare.captioner", module)
    monkeypatch.setattr(Captioner, "batches", [])


MODEL = ("--model", "blip", "--batch-size", 4, "--max-new-tokens", 9, "--prompt", "so")


def test_model(birds, tmp_path, model):
    assert run(birds, tmp_path / "out", *MODEL, "--shards", 2) == 0
    expected = [record | {"synthetic": ["so blip cpu 9 (24, 32)"]} for record in read(birds)]
    assert read(tmp_path / "out") == expected
    assert Captioner.batches == [4, 4, 2, 4, 4, 2]  # none goes on from shard to shard


def test_model_and_images_that_cannot_be_used(tmp_path, model):
    (tmp_path / "in/fox").mkdir(parents=True)
    widths = [40, 25, 40, 15, 40, 40]
    for number, width in enumerate(widths):
        data = encoded(number, ".jpg", 30, width)
        (tmp_path / f"in/fox/{number}.jpg").write_bytes(data[:-100] if number == 4 else data)
    flags = ("--no-decode", "--name", "x")
    assert run_listed("imagefolder", tmp_path / "in", tmp_path / "one", *flags) == 0
    flags = ("--no-decode", "--min-side", 20, "--shards", 2, "--batch-size", 1)
    assert run(tmp_path / "one", tmp_path / "out", *MODEL, *flags) == 0
    assert [record["key"] for record in read(tmp_path / "out")] == [
        f"fox/{number}.jpg" for number in (0, 2, 5)
    ]
    assert [reason for _, reason in refused(tmp_path / "out")] == [
        "no synthetic caption",
        "too small",
        "unreadable image",
    ]


def test_model_continues(birds, tmp_path, model, monkeypatch):
    flags = (*MODEL, "--name", "x", "--shards", 5)
    assert run(birds, tmp_path / "whole", *flags) == 0
    monkeypatch.setattr(Captioner, "batches", [])
    call = Captioner.__call__

    def call_or_stop(self, images):
        if len(Captioner.batches) == 3:
            raise KeyboardInterrupt
        return call(self, images)

    monkeypatch.setattr(Captioner, "__call__", call_or_stop)
    assert run(birds, tmp_path / "out", *flags) == 130
    monkeypatch.setattr(Captioner, "__call__", call)
    assert run(birds, tmp_path / "out", *flags) == 0
    assert len(Captioner.batches) == 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_model_that_is_not_there(birds, tmp_path, model, capsys):
    assert run(birds, tmp_path / "out", "--model", "nowhere") == 2
    assert "--model nowhere: no such model" in capsys.readouterr().err


def test_captions_that_there_are_give_way(birds, tmp_path):
    for output, source, text in (("one", birds, "first"), ("two", tmp_path / "one", "second")):
        path = write_rows(tmp_path, "csv", [("00.png", text)])
        assert run(source, tmp_path / output, "--from", path) == 0
    assert [record["synthetic"] for record in read(tmp_path / "two")] == [["second"]]
