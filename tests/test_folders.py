import os
import pickle
from pathlib import Path

import pytest
from absl import logging

from declip_jax.data import input_files
from declip_jax.data.records import BadRecord
from declip_jax.data.sources import Columns, open_source
from declip_jax.data.sources.part import Part


def write(root: Path, *names: str) -> None:
    """Files that contain their names; no image is decoded here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def keys(source) -> list[str]:
    return [source[index]["key"] for index in range(len(source))]


def test_records(tmp_path):
    write(tmp_path, "test/grey_wolf/b.png", "test/grey_wolf/a.JPEG", "test/fox/é.webp")
    write(tmp_path, "test/Zebra/c.bmp", "test/Zebra/d.jpg", "train/fox/e.jpg", "train/cat/f.jpg")
    source = open_source(str(tmp_path), "test")
    assert source.class_names == ("Zebra", "fox", "grey_wolf")  # by their bytes
    assert source[4] == {
        "image": b"test/grey_wolf/b.png",
        "captions": ["a photo of a grey wolf."],
        "key": "grey_wolf/b.png",
        "label": 2,
    }
    assert keys(source) == ["Zebra/c.bmp", "Zebra/d.jpg", "fox/é.webp"] + [
        f"grey_wolf/{name}" for name in ("a.JPEG", "b.png")
    ]
    assert [source[index]["label"] for index in range(5)] == [0, 0, 1, 2, 2]
    assert str(source) == f"{tmp_path}/test" and source.refused == {}
    assert source.locate(4) == f"{tmp_path}/test/grey_wolf/b.png"
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source[index]


def test_parts_of_a_split(tmp_path):
    write(tmp_path, *(f"train/{name}/{n}.jpg" for name in "ab" for n in range(5)))
    part = open_source(str(tmp_path), "train[:60%]")
    assert isinstance(part, Part) and len(part) == 6 and part.class_names == ("a", "b")
    assert part[5]["key"] == "b/0.jpg"


def test_without_folders_of_splits_any_split_is_all(tmp_path):
    write(tmp_path, "cat/a.jpg", "train/b.jpg", "dog/c.jpg")
    for split in ("train", "test", "cat"):  # also one that a class is called like
        assert keys(open_source(str(tmp_path), split)) == ["cat/a.jpg", "dog/c.jpg", "train/b.jpg"]


def test_empty_classes_keep_their_labels(tmp_path):
    write(tmp_path, "b/1.jpg", "b/2.jpg", "d/3.jpg")
    for name in "ace":
        (tmp_path / name).mkdir()
    source = open_source(str(tmp_path), "test")
    assert source.class_names == ("a", "b", "c", "d", "e")
    assert [source[index]["label"] for index in range(3)] == [1, 1, 3]


def test_what_is_no_image_is_left_out_and_told(tmp_path, caplog):
    logging.set_verbosity(logging.WARNING)  # commands that other tests call set it higher
    write(
        tmp_path, "a/1.jpg", "b/2.jpg", "a/.DS_Store", ".git/x.jpg", "a/notes.txt", "a/deep/3.jpg"
    )
    write(tmp_path, "list.csv")
    with open(os.fsencode(tmp_path) + b"/a/caf\xe9.jpg", "w"):
        pass
    source = open_source(str(tmp_path), "test")
    assert keys(source) == ["a/1.jpg", "b/2.jpg"]
    assert source.refused == {
        "no image": (2, ["a/deep", "a/notes.txt"]),
        "not UTF-8": (1, ["caf\\udce9.jpg"]),
    }
    assert "2 for 'no image' ('a/deep', 'a/notes.txt')" in caplog.text


def test_images_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg")
    source = open_source(str(tmp_path), "test")
    (tmp_path / "a" / "1.jpg").unlink()
    with pytest.raises(BadRecord, match="missing image"):
        source[0]
    monkeypatch.setattr(input_files, "MAX_IMAGE_BYTES", 3)
    with pytest.raises(BadRecord, match="file too large"):
        source[1]


def test_copies_for_other_processes_are_small(tmp_path):
    write(tmp_path, *(f"{name}/{n:05d}.jpg" for name in "ab" for n in range(500)))
    source = open_source(str(tmp_path), "test")
    pickled = pickle.dumps(source)
    assert len(pickled) < 25 * len(source) + 2000
    assert keys(pickle.loads(pickled)) == keys(source)


def test_other_files_are_another_layout(tmp_path):
    layouts = []
    for number, names in enumerate((["a/1.jpg", "b/2.jpg"], ["a/1.jpg", "b/3.jpg"])):
        write(tmp_path / str(number), *names)
        layouts.append(open_source(str(tmp_path / str(number)), "test").layout())
    assert layouts[0] != layouts[1]


@pytest.mark.parametrize(
    "names, split, words",
    [
        (["train/a/1.jpg", "val/a/2.jpg"], "test", r"no folder 'test'.* it has \['train', 'val'\]"),
        (["test/0.tar", "train/0.tar"], "val", r"no folder 'val'.*it has \['test', 'train'\]"),
        (["test/a/x/1.jpg"], "test", r"test' has no images in class folders.*it has \['a'\]"),
        (["a/1.txt", "b/2.txt"], "test", "no images in class folders"),
        (
            ["images/1.jpg", "captions.csv"],
            "test",
            r"images in \['images'\]: expected a folder for",
        ),
        (["train/1.jpg", "test/2.jpg"], "test", r"images in \['test', 'train'\]: expected"),
    ],
)
def test_folders_that_are_no_classes(tmp_path, names, split, words):
    write(tmp_path, *names)
    with pytest.raises(ValueError, match=words):
        open_source(str(tmp_path), split)


def test_columns_are_refused(tmp_path):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    with pytest.raises(ValueError, match="config.data.columns.label"):
        open_source(str(tmp_path), "test", Columns(label="class"))
