import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from declip_jax.data.records import BadRecord
from declip_jax.data.sources import Columns, captioned, open_source


def write_images(folder: Path, *names: str) -> None:
    """Files that contain their names; no image is decoded here."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def karpathy(*images: tuple[str, str, str, list[str]]) -> str:
    """A list of (folder, file, split, captions) with what else such files have."""
    entries = [
        ({"filepath": folder} if folder else {})
        | {"filename": name, "split": split, "imgid": number, "sentids": [0, 1]}
        | {"sentences": [{"raw": text, "tokens": text.split(), "sentid": 1} for text in texts]}
        for number, (folder, name, split, texts) in enumerate(images)
    ]
    return json.dumps({"images": entries, "dataset": "coco"})


def records(source) -> list[tuple[str, list[str]]]:
    found = [source[index] for index in range(len(source))]
    assert all(record["image"] == record["key"].encode() for record in found)
    return [(record["key"], record["captions"]) for record in found]


COCO = karpathy(
    ("val2014", "1.jpg", "test", ["one", "two ", "three", "four", "five", "six"]),
    ("train2014", "2.jpg", "train", ["a"]),
    ("val2014", "3.jpg", "restval", ["b"]),
    ("val2014", "4.jpg", "val", ["c"]),
    ("val2014", "5.jpg", "test", ["d", "é"]),
)


def test_karpathy_splits(tmp_path):
    (tmp_path / "dataset_coco.json").write_text(COCO)
    names = ("val2014/1.jpg", "train2014/2.jpg", *(f"val2014/{n}.jpg" for n in (3, 4, 5)))
    write_images(tmp_path, *names)

    def of(split):
        return open_source(str(tmp_path / "dataset_coco.json"), split)

    source = of("test")
    assert records(source) == [
        ("val2014/1.jpg", ["one", "two ", "three", "four", "five", "six"]),
        ("val2014/5.jpg", ["d", "é"]),
    ]
    assert source.class_names == () and source.refused == {} and "label" not in source[0]
    assert str(source) == f"{tmp_path}/dataset_coco.json test"
    assert source.locate(1) == f"{tmp_path}/dataset_coco.json: val2014/5.jpg"
    # What Karpathy adds to the training images of COCO belongs to them.
    assert records(of("train")) == [("train2014/2.jpg", ["a"]), ("val2014/3.jpg", ["b"])]
    assert records(of("restval")) == [("val2014/3.jpg", ["b"])]
    assert records(of("test[1:]")) == [("val2014/5.jpg", ["d", "é"])]
    with pytest.raises(ValueError, match=r"'validation', only of \['restval', 'test', 'train', 'v"):
        of("validation")
    for index in (-1, 2):
        with pytest.raises(IndexError):
            source[index]


def test_where_the_images_are(tmp_path):
    path = tmp_path / "lists" / "dataset_flickr30k.json"
    path.parent.mkdir()
    path.write_text(karpathy(*(("", f"{n}.jpg", "test", ["a"]) for n in range(3))))
    expected = [(f"{n}.jpg", ["a"]) for n in range(3)]
    with pytest.raises(ValueError) as error:
        open_source(str(path), "test")
    assert f"'0.jpg', is in {path.parent} or {path.parent}/images" in str(error.value)
    assert f"'{path}@/data/images'" in str(error.value)

    write_images(tmp_path / "else@where", "0.jpg", "1.jpg", "2.jpg")
    assert records(open_source(f"{path}@{tmp_path}/else@where", "test")) == expected
    write_images(path.parent / "images", "0.jpg", "1.jpg", "2.jpg")
    assert records(open_source(str(path), "test")) == expected
    for folder in ("empty", "missing"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"first 3 images.*is in .*{folder}"):
            open_source(f"{path}@{tmp_path}/{folder}", "test")


def test_lists_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text("image,caption\na.jpg,a\n")
    write_images(Path("."), "a.jpg")
    assert records(open_source("list.csv", "test")) == [("a.jpg", ["a"])]


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
def test_rows_of_an_image_are_one_record(tmp_path, suffix, delimiter):
    rows = [
        "id|filename|title",
        "0|b.jpg|first",
        '1|a.jpg|"one, with ""quotes"""',
        "",
        "2|b.jpg|second",
        "3|b.jpg|first",
    ]
    text = "\ufeff" + "\r\n".join(rows).replace("|", delimiter)
    (tmp_path / f"list.{suffix}").write_text(text, encoding="utf-8")
    write_images(tmp_path, "a.jpg", "b.jpg")
    for split in ("train", "test"):
        assert records(open_source(str(tmp_path / f"list.{suffix}"), split)) == [
            ("b.jpg", ["first", "second", "first"]),
            ("a.jpg", ['one, with "quotes"']),
        ]


def test_csv_columns_and_splits(tmp_path):
    (tmp_path / "list.csv").write_text(
        "photo,split,english,french,machine\n"
        "a.jpg,train,dog,chien,a dog\n"
        "b.jpg,test,cat,chat,a cat\n"
        "a.jpg,train,hound,,a dog\n"
    )
    write_images(tmp_path, "a.jpg", "b.jpg")
    columns = Columns(image="photo", captions=("english", "french"), synthetic=("machine",))
    source = open_source(str(tmp_path / "list.csv"), "train", columns)
    assert records(source) == [("a.jpg", ["dog", "chien", "hound"])]
    assert source[0]["synthetic"] == ["a dog"]
    assert source.refused == {"empty caption": (1, ["a.jpg"])}
    source = open_source(
        str(tmp_path / "list.csv"), "test", dataclasses.replace(columns, synthetic=())
    )
    assert records(source) == [("b.jpg", ["cat", "chat"])] and "synthetic" not in source[0]
    with pytest.raises(ValueError, match=r"split 'val', only of \['test', 'train'\]"):
        open_source(str(tmp_path / "list.csv"), "val", columns)


def test_jsonl(tmp_path):
    lines = [
        {"image": "b.jpg", "captions": ["one", "two"], "split": "test", "synthetic": "x"},
        {"image": "a.jpg", "captions": "three", "split": "test", "synthetic": ["y", "z"]},
        {"image": "c.jpg", "captions": ["four"], "split": "train", "synthetic": "x"},
        {"image": "b.jpg", "captions": ["five"], "split": "test", "synthetic": "x"},
        {"image": "d.jpg", "captions": ["six", 7], "split": "test", "synthetic": "x"},
        {"image": 8, "captions": ["six"], "split": "test", "synthetic": "x"},
        {"image": "d.jpg", "captions": ["six"], "split": 9, "synthetic": "x"},
        {"image": "d.jpg", "split": "test", "synthetic": "x"},
        ["d.jpg", "six"],
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{\n"
    (tmp_path / "list.jsonl").write_text(text)
    write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    source = open_source(str(tmp_path / "list.jsonl"), "test")
    assert records(source) == [("b.jpg", ["one", "two", "five"]), ("a.jpg", ["three"])]
    assert [source[index]["synthetic"] for index in (0, 1)] == [["x"], ["y", "z"]]
    assert source.refused["bad row"] == (5, ["line 5", "line 6", "line 7"])
    assert source.refused["bad JSON"] == (1, ["line 10"])


def test_images_that_cannot_be_read_are_bad_records(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    folder = tmp_path / "data"
    write_images(folder, "here.jpg")
    names = [
        "gone.jpg",
        "../secret.jpg",
        f"{tmp_path}/secret.jpg",
        "x/../../secret.jpg",
        "here.jpg",
    ]
    (folder / "list.csv").write_text("image,caption\n" + "".join(f"{n},a\n" for n in names))
    source = open_source(str(folder / "list.csv"), "test")
    assert source[4]["image"] == b"here.jpg"
    for index, reason in enumerate(["missing image"] + ["unsafe name"] * 3):
        with pytest.raises(BadRecord, match=reason):
            source[index]


def test_only_the_first_images_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(captioned, "LOOKED_FOR", 2)
    path = tmp_path / "list.csv"
    path.write_text("image,caption\na.jpg,a\nb.jpg,b\nc.jpg,c\n")
    write_images(tmp_path, "c.jpg")
    with pytest.raises(ValueError, match="none of its first 2 images, such as 'a.jpg'"):
        open_source(str(path), "test")
    write_images(tmp_path, "b.jpg")
    assert len(open_source(str(path), "test")) == 3


def test_copies_for_other_processes(tmp_path):
    names = [f"{n:04d}.jpg" for n in range(300)]
    write_images(tmp_path, *names)
    lines = [f"{name},a caption of {name}\n" for name in names]
    (tmp_path / "list.csv").write_text("image,caption\n" + "".join(lines))
    source = open_source(str(tmp_path / "list.csv"), "test")
    pickled = pickle.dumps(source)
    assert len(pickled) < 60 * len(source) + 2000
    assert records(pickle.loads(pickled)) == records(source)


def test_other_captions_are_another_layout(tmp_path):
    write_images(tmp_path, "a.jpg")
    layouts = []
    for caption in ("one", "two"):
        (tmp_path / "list.csv").write_text(f"image,caption\na.jpg,{caption}\n")
        layouts.append(open_source(str(tmp_path / "list.csv"), "test").layout())
    assert layouts[0] != layouts[1]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("x.json", "", "is not JSON"),
        ("x.json", '{"images": [', "is not JSON"),
        ("x.json", "caf\udce9", "is not JSON"),
        ("x.json", "[" * 100_000, "is not JSON"),
        ("x.json", "[]", "no list of Karpathy's splits"),
        ("x.json", '{"annotations": []}', "no list of Karpathy's splits"),
        ("x.json", '{"images": []}', "lists no images"),
        ("x.json", '{"images": [7]}', r"images\[0\] is no image of Karpathy's splits"),
        ("x.json", '{"images": [{"file_name": "a.jpg", "id": 1}]}', r"images\[0\].*'filename'"),
        ("x.json", karpathy((7, "a.jpg", "test", ["a"])), r"images\[0\]"),
        ("x.json", karpathy(("", "a.jpg", 7, ["a"])), r"images\[0\].*expected texts"),
        ("x.json", karpathy(("", "a.jpg", "test", [])), "no images that can be used.*no caption"),
        ("x.csv", "", "config.data.columns.image.*has none of the usual ones"),
        ("x.csv", "image,label\na.jpg,cat\n", "config.data.columns.captions.*It has: image: text,"),
        ("x.csv", "picture,caption\na.jpg,cat\n", "config.data.columns.image"),
        ("x.csv", "image,caption\n", "lists no images that can be used: it is empty"),
        (
            "x.csv",
            "image,caption\na.jpg\n",
            "lists no images that can be used: left out 1 for 'bad",
        ),
        ("x.tsv", "image,caption\na.jpg,cat\n", "config.data.columns.captions"),
        ("x.jsonl", '{"image": "a.jpg", "caption": 7}\n', "config.data.columns.captions.*: int"),
        ("x.jsonl", "[1]\n", "config.data.columns.image"),
        ("x.jsonl", "", "lists no images that can be used"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, name, text, words):
    (tmp_path / name).write_text(text, errors="surrogateescape")
    write_images(tmp_path, "a.jpg")
    with pytest.raises(ValueError, match=words):
        open_source(str(tmp_path / name), "test")


@pytest.mark.parametrize(
    "name, columns, words",
    [
        ("x.csv", Columns(image="photo"), "columns.image: .*x.csv has no 'photo'"),
        ("x.csv", Columns(captions=("text",)), "columns.captions: .*x.csv has no 'text'"),
        ("x.csv", Columns(synthetic=("text",)), "columns.synthetic"),
        ("x.csv", Columns(key="id"), "columns.key"),
        ("x.csv", Columns(label="class"), "columns.label"),
        ("x.json", Columns(captions=("raw",)), "fields of .*x.json have fixed names"),
    ],
)
def test_columns_that_are_not_there(tmp_path, name, columns, words):
    text = "image,caption\na.jpg,a\n" if name == "x.csv" else COCO
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        open_source(str(tmp_path / name), "test", columns)


def test_lists_that_are_not_there(tmp_path, monkeypatch):
    for name in (f"{tmp_path}/x.csv", "gs://bucket/x.json"):
        with pytest.raises(ValueError, match="no such file on a local disk"):
            open_source(name, "test")
    (tmp_path / "x.json").write_text(COCO)
    monkeypatch.setattr(captioned, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="bytes, which are read at once"):
        open_source(str(tmp_path / "x.json"), "test")
