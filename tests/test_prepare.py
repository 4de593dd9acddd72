import hashlib
import importlib.util
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from declip_jax import prepare
from declip_jax.data import image, parallel, records
from declip_jax.prepare import filters
from declip_jax.prepare.conversion import locked


def encoded(seed: int, extension: str = ".jpg", height: int = 24, width: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(extension, pixels)[1].tobytes()


def run(format: str, images, output, *flags) -> int:
    arguments = [format, "--images", images, "--output", output, "--workers", 1, *flags]
    return prepare.main([str(argument) for argument in arguments])


def read(output, split: str = "train") -> list[records.Record]:
    source = tfds.builder_from_directory(output).as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    return [records.deserialize(stored) for stored in source]


def refused(output, split: str = "train") -> list[tuple[str, str]]:
    lines = (output / f"refused-{split}.jsonl").read_text().splitlines()
    return [(entry["key"], entry["reason"]) for entry in map(json.loads, lines)]


def manifest(output, split: str = "train") -> dict:
    return json.loads((output / f"prepare-{split}.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path)


def make_photos(tmp_path: Path) -> Path:
    """A folder of 20 images, and beside it photos.csv with two captions for each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = ["image,caption"]
    for number in range(20):
        name = f"{number:02d}" + (".png", ".webp", ".jpg")[number % 3]
        (folder / name).write_bytes(encoded(number, name[2:]))
        rows += [f"{name},caption {number}", f'{name},"another, {number}"']
    (tmp_path / "photos.csv").write_text("\n".join(rows))
    return folder


def csv_flags(photos: Path) -> tuple:
    return "--captions", photos.with_suffix(".csv")


# The three kinds of input


def test_csv_from_a_folder(photos, tmp_path, capsys):
    output = tmp_path / "birds"
    assert run("csv", photos, output, *csv_flags(photos), "--shards", 3) == 0
    names = sorted(os.listdir(photos))
    assert read(output) == [
        {
            "image": (photos / name).read_bytes(),
            "captions": [f"caption {number}", f"another, {number}"],
            "key": name,
        }
        for number, name in enumerate(names)
    ]
    printed = capsys.readouterr().out
    assert "train: kept 20 images with 40 captions" in printed
    assert "refused  nothing" in printed
    assert sorted(os.listdir(output)) == [
        *(f"birds-train.array_record-0000{number}-of-00003" for number in range(3)),
        "dataset_info.json",
        "features.json",
        "prepare-train.json",
        "refused-train.jsonl",
    ]
    info = tfds.builder_from_directory(output).info
    assert (info.name, info.splits["train"].shard_lengths) == ("birds", [6, 7, 7])
    for shard, count in zip(manifest(output)["shards"], [6, 7, 7], strict=True):
        data = (output / shard["name"]).read_bytes()
        checksum = hashlib.sha256(data).hexdigest()
        assert shard == {
            "name": shard["name"],
            "records": count,
            "bytes": len(data),
            "sha256": checksum,
        }


def test_synthetic_captions(photos, tmp_path, capsys):
    rows = ["image,caption,machine"]
    for number, name in enumerate(sorted(os.listdir(photos))):
        rows.append(f"{name},caption {number},{f'seen {number}' if number else ''}")
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    output = tmp_path / "birds"
    flags = ("--captions", tmp_path / "rows.csv", "--synthetic-column", "machine")
    assert run("csv", photos, output, *flags) == 0
    assert [record["synthetic"] for record in read(output)] == [[f"seen {n}"] for n in range(1, 20)]
    assert refused(output) == [("00.png", "no synthetic caption")]
    assert "synthetic" in tfds.builder_from_directory(output).info.features

    # A second split may call the column otherwise, but has to have one.
    assert run("csv", photos, output, *flags[:2], "--split", "test") == 2
    assert "split 'train' has some and this one none" in capsys.readouterr().err
    changed = ("--split", "test", "--synthetic-column", "caption")
    assert run("csv", photos, output, *flags[:2], *changed) == 0
    assert read(output, "test")[0]["synthetic"] == ["caption 0"]


def test_synthetic_captions_of_jsonl_and_imagefolder(tmp_path):
    (tmp_path / "in/fox").mkdir(parents=True)
    (tmp_path / "in/fox/a.jpg").write_bytes(encoded(1))
    row = {"filename": "fox/a.jpg", "caption": "Mr Fox", "machine": "an animal"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    flags = ("--captions", tmp_path / "rows.jsonl", "--synthetic-field", "machine")
    assert run("jsonl", tmp_path / "in", tmp_path / "one", *flags) == 0
    assert read(tmp_path / "one")[0]["synthetic"] == ["an animal"]

    flags = ("--synthetic-template", "a {}", "--synthetic-template", "some {}")
    assert run("imagefolder", tmp_path / "in", tmp_path / "two", *flags) == 0
    assert read(tmp_path / "two")[0]["synthetic"] == ["a fox", "some fox"]
    assert read(tmp_path / "two")[0]["captions"] == ["a photo of a fox."]


def test_csv_inside_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as archive:
        archive.writestr("pictures/a.jpg", encoded(1))
        archive.writestr("meta/rows.csv", "text,file\nhello,a.jpg\n")
    flags = ("--captions", "meta/rows.csv", "--image-column", "file", "--caption-column", "text")
    output = tmp_path / "birds"
    assert run("csv", tmp_path / "birds.zip", output, "--subfolder", "pictures", *flags) == 0
    assert read(output) == [{"image": encoded(1), "captions": ["hello"], "key": "a.jpg"}]


def test_jsonl(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/a.png").write_bytes(encoded(1, ".png"))
    (tmp_path / "rows.jsonl").write_text('{"path": "er/a.png", "text": "naïve", "url": "x"}\n')
    flags = ("--captions", tmp_path / "rows.jsonl", "--image-field", "path")
    output = tmp_path / "yfcc"
    assert run("jsonl", tmp_path / "deep", output, *flags, "--caption-field", "text") == 0
    assert read(output) == [{"image": encoded(1, ".png"), "captions": ["naïve"], "key": "er/a.png"}]


@pytest.fixture
def animals(tmp_path) -> Path:
    with zipfile.ZipFile(tmp_path / "animals.zip", "w") as archive:
        for number, name in enumerate(
            ["train/grey_wolf/b", "train/fox/a", "test/fox/c", "test/grey_wolf/d", "odd/fox/e"]
        ):
            archive.writestr(f"{name}.jpg", encoded(number))
    return tmp_path / "animals.zip"


def test_imagefolder_and_a_second_split(animals, tmp_path):
    output = tmp_path / "animals"
    flags = ("--template", "a photo of a {}.", "--template", "the {}")
    assert run("imagefolder", animals, output, "--subfolder", "train", *flags) == 0
    assert run("imagefolder", animals, output, "--subfolder", "test", "--split", "test") == 0
    fox, wolf = read(output)
    captions = ["a photo of a fox.", "the fox"]
    assert fox == {"image": encoded(1), "captions": captions, "key": "fox/a.jpg", "label": 0}
    captions = ["a photo of a grey wolf.", "the grey wolf"]
    assert wolf == {
        "image": encoded(0),
        "captions": captions,
        "key": "grey_wolf/b.jpg",
        "label": 1,
    }
    assert [entry["captions"] for entry in read(output, "test")] == [
        ["a photo of a fox."],
        ["a photo of a grey wolf."],
    ]
    assert tfds.builder_from_directory(output).info.features["label"].names == ["fox", "grey wolf"]


def test_a_second_split_must_fit(animals, photos, tmp_path, capsys):
    output = tmp_path / "animals"
    assert run("imagefolder", animals, output, "--subfolder", "train") == 0
    before = contents(output)
    odd = ("--subfolder", "odd", "--split", "odd")
    assert run("imagefolder", animals, output, *odd) == 2
    assert "have the same class_names" in capsys.readouterr().err
    assert run("csv", photos, output, *csv_flags(photos), "--split", "more") == 2
    assert "have the same class_names" in capsys.readouterr().err
    test = ("--subfolder", "test", "--split", "test")
    assert run("imagefolder", animals, output, *test, "--name", "beasts") == 2
    assert "have the same name, but split 'train' has 'animals'" in capsys.readouterr().err
    assert contents(output) == before


# What is refused


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    length, crc = struct.pack(">I", 13), struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + length + header + crc


def test_refused_images(photos, tmp_path, capsys):
    bad = {
        "cut.jpg": encoded(1)[:-100],
        "cut.png": encoded(1, ".png")[:-100],
        "cut.webp": encoded(1, ".webp")[:-100],
        "text.jpg": b"<html>404</html>",
        "empty.jpg": b"",
        "stub.png": png_header(1, 1)[:20],
        "bomb.png": png_header(30_000, 30_000),
        "wide.jpg": encoded(1, width=200),
    }
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    captions = photos.with_suffix(".csv")
    with open(captions, "a") as file:
        file.writelines(f"\n{name},x" for name in [*bad, "nowhere.jpg", "../photos.csv", "00.png"])
        file.write("\n01.webp,\n")
    output = tmp_path / "birds"
    assert run("csv", photos, output, "--captions", captions, "--max-pixels", "1000") == 0
    assert len(read(output)) == 20
    assert refused(output) == [
        ("01.webp", "empty caption"),
        ("cut.jpg", "unreadable image"),
        ("cut.png", "unreadable image"),
        ("cut.webp", "unreadable image"),
        ("text.jpg", "unreadable image"),
        ("empty.jpg", "unreadable image"),
        ("stub.png", "unreadable image"),
        ("bomb.png", "too many pixels"),
        ("wide.jpg", "too many pixels"),
        ("nowhere.jpg", "missing image"),
        ("../photos.csv", "unsafe name"),
    ]
    printed = capsys.readouterr().out
    assert "kept 20 images with 41 captions" in printed
    for reason, count in [("unreadable image", 6), ("too many pixels", 2), ("missing image", 1)]:
        assert re.search(rf"refused  {reason} +{count}\n", printed)


def test_a_huge_image_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "decode", lambda *_: pytest.fail("decoded"))
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox/bomb.png").write_bytes(png_header(30_000, 30_000))
    (tmp_path / "fox/a.png").write_bytes(png_header(3, 3))
    assert run("imagefolder", tmp_path, tmp_path / "out", "--no-decode") == 0
    assert refused(tmp_path / "out") == [("fox/bomb.png", "too many pixels")]


def test_short_side(tmp_path):
    names = ["fox/large.png", "fox/small.png", "fox/tall.jpg"]
    sizes = [(60, 90), (40, 300), (90, 45)]
    (tmp_path / "fox").mkdir()
    for name, (height, width) in zip(names, sizes, strict=True):
        (tmp_path / name).write_bytes(encoded(1, name[-4:], height, width))
    assert run("imagefolder", tmp_path, tmp_path / "out", "--short-side", 40) == 0
    large, small, tall = (record["image"] for record in read(tmp_path / "out"))
    assert small == (tmp_path / names[1]).read_bytes()
    assert [data[:2] for data in (large, tall)] == [b"\xff\xd8"] * 2
    assert [image.size(data) for data in (large, tall)] == [(40, 60), (80, 40)]
    expected = cv2.resize(
        image.decode((tmp_path / names[0]).read_bytes()), (60, 40), interpolation=cv2.INTER_AREA
    )
    difference = image.decode(large).astype(int) - expected
    assert np.abs(difference).mean() < 3


def test_short_side_of_a_turned_image(tmp_path):
    """What is encoded anew is upright, for it has no EXIF orientation any more."""
    (tmp_path / "fox").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = Image.open(io.BytesIO(encoded(1, ".png", 60, 90)))
    turned.save(tmp_path / "fox/a.jpg", exif=exif)
    assert run("imagefolder", tmp_path, tmp_path / "out", "--short-side", 40) == 0
    (record,) = read(tmp_path / "out")
    assert image.decode(record["image"]).shape == (60, 40, 3)
    assert Image.open(io.BytesIO(record["image"])).size == (40, 60)


def test_filters_of_images(tmp_path, capsys):
    sizes = {"small": (19, 40), "just": (20, 40), "long": (20, 41), "tall": (70, 20)}
    (tmp_path / "fox").mkdir()
    for name, (height, width) in sizes.items():
        (tmp_path / f"fox/{name}.jpg").write_bytes(encoded(1, ".jpg", height, width))
    flags = ("--min-side", 20, "--max-aspect", 2, "--short-side", 10)
    assert run("imagefolder", tmp_path, tmp_path / "out", *flags) == 0
    assert [record["key"] for record in read(tmp_path / "out")] == ["fox/just.jpg"]
    assert refused(tmp_path / "out") == [
        ("fox/long.jpg", "too long"),
        ("fox/small.jpg", "too small"),
        ("fox/tall.jpg", "too long"),
    ]
    assert manifest(tmp_path / "out")["refused"] == {"too long": 2, "too small": 1}
    assert re.search(r"refused  too long +2\n", capsys.readouterr().out)


def test_filters_of_captions(photos, tmp_path):
    rows = [
        ("00.png", "one"),
        ("00.png", "two words"),
        ("00.png", "more words than there may be"),
        ("01.webp", "only"),
        ("02.jpg", "a \u4e00"),
        ("02.jpg", "a \u9fa5"),
        ("02.jpg", "a \u9fa6"),  # beyond DeCLIP's range
        ("03.png", "\u304b\u306a kana"),
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["image,caption", *map(",".join, rows)]))
    flags = ("--captions", tmp_path / "rows.csv", "--min-words", 2, "--max-words", 4)
    output = tmp_path / "out"
    assert run("csv", photos, output, *flags, "--language-filter", "declip") == 0
    assert {record["key"]: record["captions"] for record in read(output)} == {
        "00.png": ["two words"],
        "02.jpg": ["a \u9fa6"],
        "03.png": ["\u304b\u306a kana"],
    }
    assert refused(output) == [
        ("00.png", "too few words"),
        ("00.png", "too many words"),
        ("01.webp", "too few words"),
        ("01.webp", "no caption left"),
        ("02.jpg", "Chinese characters"),
        ("02.jpg", "Chinese characters"),
    ]


def test_captions_as_attackers_write_them(photos, tmp_path):
    kept = "bell \x07, null \x00, <end_of_text> and \u202eright to left"
    rows = [
        {"filename": "00.png", "caption": kept},
        {"filename": "01.webp", "caption": "x" * 10_000_000},
        {"filename": "k" * 10_000_000, "caption": "x"},
        {"filename": "02.jpg", "caption": {"not": "a text"}},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--captions", tmp_path / "rows.jsonl")
    assert run("jsonl", photos, tmp_path / "out", *flags) == 0
    (record,) = read(tmp_path / "out")
    assert record["captions"] == [kept]
    reasons = [reason for _, reason in refused(tmp_path / "out")]
    assert reasons == ["caption too long", "caption too long", "bad row"]

    (tmp_path / "rows.csv").write_text(f"image,caption\n00.png,{'x' * 10_000_000}\n01.webp,y\n")
    assert run("csv", photos, tmp_path / "two", "--captions", tmp_path / "rows.csv") == 0
    assert [reason for _, reason in refused(tmp_path / "two")] == ["bad row"]
    (tmp_path / "rows.csv").write_text(f"image,caption\n00.png,{'x' * 20_000_000}")
    assert run("csv", photos, tmp_path / "three", "--captions", tmp_path / "rows.csv") == 2


# What cannot be done


def test_arguments_that_cannot_be(photos, animals, tmp_path, capsys):
    (tmp_path / "empty/fox").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.csv").write_text("image,text\n00.png,x\n")
    (tmp_path / "none.csv").write_text("image,caption\n")
    (tmp_path / "lost.csv").write_text("image,caption\nnowhere.jpg,x\n")
    (tmp_path / "x.tar").write_bytes(b"no zip")
    captions, output = csv_flags(photos), tmp_path / "out"
    train, words = ("--subfolder", "train"), ("--min-words", 3, "--max-words", 2)
    for message, *arguments in [
        ("no column 'caption'", "csv", photos, output, "--captions", tmp_path / "bad.csv"),
        ("nothing is listed", "csv", photos, output, "--captions", tmp_path / "none.csv"),
        ("{'missing image': 1}", "csv", photos, output, "--captions", tmp_path / "lost.csv"),
        ("--captions nowhere.csv", "csv", photos, output, "--captions", "nowhere.csv"),
        ("no such folder", "csv", tmp_path / "nowhere", output, *captions),
        ("nor a whole zip|neither a folder", "csv", tmp_path / "x.tar", output, *captions),
        ("cannot write there", "csv", photos, tmp_path / "file/out", *captions),
        ("--name 'a-b'", "csv", photos, tmp_path / "a-b", *captions),
        ("--split 'all'", "csv", photos, output, *captions, "--split", "all"),
        ("--max-pixels", "csv", photos, output, *captions, "--max-pixels", image.MAX_PIXELS + 1),
        ("found no .*<class>/<image>", "imagefolder", tmp_path / "empty", output),
        ("try|perhaps pass --subfolder", "imagefolder", animals, output),
        ("--min-words 3: more than", "csv", photos, output, *captions, *words),
        ("no {} for", "imagefolder", animals, output, *train, "--template", "a {name}"),
        ("'a' has no {}", "imagefolder", animals, output, *train, "--synthetic-template", "a"),
        ("--classes", "imagefolder", animals, output, *train, "--classes", "nowhere.txt"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert "Traceback" not in error
    # A failed attempt leaves nothing behind that would stop a better one.
    assert run("csv", photos, output, *captions) == 0


def test_beam_that_is_not_installed(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    flags = (*csv_flags(photos), "--beam", "--runner=DirectRunner --direct_num_workers=2")
    assert run("csv", photos, tmp_path / "out", *flags) == 2
    assert "pip install 'declip-jax[beam]'" in capsys.readouterr().err


def test_every_format_has_an_example(capsys):
    formats = ("csv", "imagefolder", "jsonl", "webdataset", "parquet", "tfds", "array_record")
    for name in (*formats, "captions", "verify", "synonyms"):
        with pytest.raises(SystemExit) as exit:
            prepare.main([name, "--help"])
        assert exit.value.code == 0
        assert f"example:\n  python -m declip_jax.prepare {name} " in capsys.readouterr().out


def test_a_foreign_data_set_is_left_alone(photos, tmp_path, capsys):
    (tmp_path / "dataset_info.json").write_text("{}")
    assert run("csv", photos, tmp_path, *csv_flags(photos), "--name", "birds") == 2
    assert "from elsewhere" in capsys.readouterr().err


# Interruptions


def test_the_number_of_workers_does_not_matter(photos, tmp_path):
    (photos / "07.webp").unlink()
    flags = (*csv_flags(photos), "--name", "birds", "--short-side", "20", "--shards", "5")
    assert run("csv", photos, tmp_path / "one", *flags) == 0
    assert run("csv", photos, tmp_path / "two", *flags, "--workers", "2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert refused(tmp_path / "two") == [("07.webp", "missing image")]


def test_resume(photos, tmp_path, monkeypatch, capsys):
    """Stopped before any of its steps and continued, a run ends with the same result."""
    (photos / "07.webp").unlink()
    flags = (*csv_flags(photos), "--name", "birds", "--shards", "4")
    assert run("csv", photos, tmp_path / "whole", *flags) == 0

    steps = 0

    def counted(function):
        def call(*arguments):
            nonlocal steps
            steps += 1
            if steps == stop:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow
    monkeypatch.setattr(os, "replace", counted(os.replace))  # gives a finished file its name
    monkeypatch.setattr(filters, "check_image", counted(filters.check_image))
    for stop in range(1, 100):
        steps, output = 0, tmp_path / f"stopped-{stop}"
        code = run("csv", photos, output, *flags)
        if code == 0:
            break
        assert code == 130
        assert "the same command continues" in capsys.readouterr().err
        assert run("csv", photos, output, *flags) == 0
        assert contents(output) == contents(tmp_path / "whole")
    assert 30 < stop < 99


def test_resume_after_being_killed(photos, tmp_path):
    flags = (*csv_flags(photos), "--name", "birds", "--shards", "4")
    assert run("csv", photos, tmp_path / "whole", *flags) == 0

    script = """
import os, signal, sys
from declip_jax import prepare
from declip_jax.prepare import filters
check_image, calls = filters.check_image, 0
def check_or_die(*arguments):
    global calls
    calls += 1
    if calls == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return check_image(*arguments)
filters.check_image = check_or_die
prepare.main(sys.argv[1:])
"""
    arguments = ["csv", "--images", photos, "--output", tmp_path / "killed", "--workers", "1"]
    command = [sys.executable, "-c", script, *map(str, arguments), *map(str, flags)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    shards = sorted((tmp_path / "killed/train.incomplete").glob("*-of-00004"))
    assert len(shards) == 2
    written = [shard.stat().st_mtime_ns for shard in shards]

    assert run("csv", photos, tmp_path / "killed", *flags) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    kept = [(tmp_path / "killed" / shard.name).stat().st_mtime_ns for shard in shards]
    assert kept == written


@pytest.mark.slow
def test_killed_at_ten_moments(tmp_path):
    images, shards = tmp_path / "images", 80
    (images / "fox").mkdir(parents=True)
    for number in range(3 * shards):
        (images / f"fox/{number}.jpg").write_bytes(encoded(number, ".jpg", 1000, 1300))
    (images / "fox/7.jpg").write_bytes(b"no image")
    flags = ("--name", "foxes", "--short-side", "200", "--shards", shards, "--workers", "2")
    assert run("imagefolder", images, tmp_path / "whole", *flags) == 0

    output = tmp_path / "killed"
    command = [sys.executable, "-m", "declip_jax.prepare", "imagefolder", "--images", images]
    command = [*map(str, (*command, "--output", output, *flags))]

    def finished() -> int:
        return len(list(output.glob("train.incomplete/*.json")))

    rng = random.Random(0)
    seen = []
    for attempt in range(10):
        before = finished()
        process = subprocess.Popen(command, start_new_session=True)
        # So many shards later, or after some time, when it may not have begun.
        target, moment = before + rng.randint(1, 4), rng.uniform(0, 1)
        start = time.monotonic()
        while finished() < target and (attempt % 4 < 3 or time.monotonic() - start < moment):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        # Every other time its workers have to notice by themselves.
        (os.killpg if attempt % 2 else os.kill)(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        seen.append(finished())
    assert len(set(seen)) > 5  # it came further, and was not done
    assert subprocess.run(command).returncode == 0
    assert contents(output) == contents(tmp_path / "whole")


def test_half_done_with_other_settings(photos, tmp_path, monkeypatch, capsys):
    def interrupt(*_):  # not SIGINT itself: a shell may have it ignored in what it starts
        raise KeyboardInterrupt

    monkeypatch.setattr(filters, "check_image", interrupt)
    output, flags = tmp_path / "birds", csv_flags(photos)
    assert run("csv", photos, output, *flags) == 130
    monkeypatch.undo()
    assert run("csv", photos, output, *flags, "--short-side", "20", "--shards", "3") == 2
    error = capsys.readouterr().err
    assert "shards was 8, now 3; short_side was None, now 20" in error
    assert f"delete {output}/train.incomplete" in error
    with open(flags[1], "a") as file:
        file.write("\n00.png,one more\n")
    assert run("csv", photos, output, *flags) == 2
    assert "input_digest" in capsys.readouterr().err


def test_complete_already(photos, tmp_path, capsys):
    output, flags = tmp_path / "birds", csv_flags(photos)
    assert run("csv", photos, output, *flags) == 0
    before = contents(output)
    assert run("csv", photos, output, *flags) == 0
    assert "already complete" in capsys.readouterr().out
    assert run("csv", photos, output, *flags, "--no-decode") == 2
    assert "no_decode was False, now True" in capsys.readouterr().err
    assert contents(output) == before


def test_two_runs_at_once(photos, tmp_path, capsys):
    with locked(tmp_path):
        assert run("csv", photos, tmp_path, *csv_flags(photos), "--name", "birds") == 2
    assert "another run is writing there" in capsys.readouterr().err


def test_progress(capsys, monkeypatch):
    progress = parallel.Progress(done=100, total=300)
    now = progress.start
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now)
    progress.tick()
    now += 50
    progress.show(200)
    progress.tick()
    line = " ".join(capsys.readouterr().err.split())
    assert line == "200 of 300 images, 2.00 images/s, 00:50 left"
