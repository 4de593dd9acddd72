import json
import zipfile

import pytest

from declip_jax.data import input_files
from declip_jax.data.records import BadRecord


def make_zip(path, members: dict[str, bytes]) -> input_files.Files:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return input_files.Files(str(path))


@pytest.fixture
def csv_index(tmp_path):
    def index(text: str | bytes, *synthetic: str) -> input_files.Index:
        path = tmp_path / "captions.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return input_files.index_csv(
            input_files.Files(str(tmp_path)), str(path), "image", "caption", *synthetic
        )

    return index


@pytest.fixture
def jsonl_index(tmp_path):
    def index(*lines: bytes | dict, synthetic: str | None = None) -> input_files.Index:
        lines = [json.dumps(line).encode() if isinstance(line, dict) else line for line in lines]
        path = tmp_path / "captions.jsonl"
        path.write_bytes(b"\n".join(lines))
        files = input_files.Files(str(tmp_path))
        return input_files.index_jsonl(files, str(path), "filename", "caption", synthetic)

    return index


def refused(index: input_files.Index) -> list[tuple[str, str]]:
    return [(entry["key"], entry["reason"]) for entry in index.refused]


def test_csv_collects_all_rows_of_an_image(csv_index):
    index = csv_index(
        "\ufeffid,image,caption\r\n"  # with the byte order mark and line ends of a spreadsheet
        "0,b.jpg,first\r\n"
        '1,a.jpg,"one, with ""quotes"""\r\n'
        "\r\n"
        "2,b.jpg,second\r\n"
        "3,b.jpg,first\r\n"
    )
    assert index.items == [
        input_files.Item("b.jpg", ["first", "second", "first"]),
        input_files.Item("a.jpg", ['one, with "quotes"']),
    ]
    assert index.refused == []


def test_csv_synthetic_captions(csv_index):
    index = csv_index(
        b"caption,image,machine\n"
        b"one,a.jpg,a dog\n"
        b"two,a.jpg,a dog\n"
        b"three,a.jpg,\n"
        b",a.jpg,dogs\n"
        b"one,b.jpg, \n"
        b"two,c.jpg,caf\xe9\n"
        b",d.jpg,a cat\n",
        "machine",
    )
    assert index.items == [
        input_files.Item("a.jpg", ["one", "two", "three"], None, ["a dog", "dogs"])
    ]
    assert refused(index) == [
        ("a.jpg", "empty caption"),
        ("line 7", "not UTF-8"),
        ("d.jpg", "empty caption"),
        ("b.jpg", "no synthetic caption"),
        ("d.jpg", "no caption left"),
    ]
    with pytest.raises(input_files.InputError, match="no column 'robot'.*--synthetic-column"):
        csv_index("image,caption\na.jpg,x\n", "robot")


def test_csv_refusals(csv_index):
    index = csv_index(
        b"image,caption\n"
        b"a.jpg,kept\n"
        b"a.jpg, \n"
        b"b.jpg,\n"
        b"c.jpg,no quotes, but a comma\n"
        b"d.jpg\n"
        b"e.jpg,caf\xe9\n"
        b",nameless\n"
        b'f.jpg,"open quote\n'
        b"g.jpg,swallowed\n"
    )
    assert index.items == [input_files.Item("a.jpg", ["kept"])]
    assert refused(index) == [
        ("a.jpg", "empty caption"),
        ("b.jpg", "empty caption"),
        ("line 5", "bad row"),
        ("line 6", "bad row"),
        ("line 7", "not UTF-8"),
        ("line 8", "bad row"),
        ("lines 9-10", "bad row"),
        ("b.jpg", "no caption left"),
    ]


def test_csv_goes_on_after_a_malformed_row(csv_index):
    index = csv_index('image,caption\na.jpg,"good" night\nb.jpg,kept\n')
    assert index.items == [input_files.Item("b.jpg", ["kept"])]
    assert refused(index) == [("lines 2-2", "bad row")]


def test_csv_without_the_columns(csv_index):
    with pytest.raises(
        input_files.InputError, match=r"no column 'caption' among \['image', 'text'\]"
    ):
        csv_index("image,text\na.jpg,x\n")
    with pytest.raises(input_files.InputError, match="--image-column"):
        csv_index("")


def test_jsonl(jsonl_index):
    index = jsonl_index(
        {"filename": "b.jpg", "caption": "naïve", "url": "https://…"},
        b"",
        {"filename": "a.jpg", "caption": "kept"},
        {"filename": "b.jpg", "caption": "again"},
        b'{"filename": "c.jpg", "caption"',
        b'["c.jpg", "a list"]',
        {"filename": "c.jpg", "text": "another field"},
        {"filename": 7, "caption": "a number"},
        b'{"filename": "c.jpg", "caption": "caf\xe9"}',
        rb'{"filename": "c.jpg", "caption": "half of a pair: \ud83d"}',
        b"[" * 100_000,
        {"filename": "d.jpg", "caption": "\n"},
    )
    assert index.items == [
        input_files.Item("b.jpg", ["naïve"]),
        input_files.Item("a.jpg", ["kept"]),
    ]
    assert refused(index) == [
        ("b.jpg", "duplicate key"),
        ("line 5", "bad JSON"),
        ("line 6", "bad row"),
        ("line 7", "bad row"),
        ("line 8", "bad row"),
        ("line 9", "not UTF-8"),
        ("line 10", "not UTF-8"),
        ("line 11", "bad JSON"),
        ("d.jpg", "empty caption"),
        ("d.jpg", "no caption left"),
    ]
    json.dumps(index.refused, ensure_ascii=False).encode()  # nothing in the list is not UTF-8


def test_jsonl_synthetic_captions(jsonl_index):
    index = jsonl_index(
        {"filename": "a.jpg", "caption": "one", "machine": "a dog"},
        {"filename": "b.jpg", "caption": "two"},
        {"filename": "c.jpg", "caption": "two", "machine": None},
        {"filename": "d.jpg", "caption": "two", "machine": " "},
        {"filename": "e.jpg", "caption": "two", "machine": ["a cat"]},
        rb'{"filename": "f.jpg", "caption": "two", "machine": "\ud83d"}',
        synthetic="machine",
    )
    assert index.items == [input_files.Item("a.jpg", ["one"], None, ["a dog"])]
    assert refused(index) == [
        ("line 5", "bad row"),
        ("line 6", "not UTF-8"),
        ("b.jpg", "no synthetic caption"),
        ("c.jpg", "no synthetic caption"),
        ("d.jpg", "no synthetic caption"),
    ]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_imagefolder(tmp_path, kind):
    members = {
        "train/grey_wolf/b.png": b"1",
        "train/grey_wolf/a.jpg": b"2",
        "train/fox/c.JPEG": b"3",
        "train/fox/.DS_Store": b"",
        "train/fox/cubs/d.jpg": b"4",
        "train/readme.txt": b"5",
        "test/fox/e.jpg": b"6",
    }
    if kind == "zip":
        make_zip(tmp_path / "animals.zip", members)
        files = input_files.Files(str(tmp_path / "animals.zip"), "train")
    else:
        for name, data in members.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        files = input_files.Files(str(tmp_path), "train/")
    index = input_files.index_imagefolder(files, ["a {}.", "{}, a {}"], None, ["some {}"])
    assert index.class_names == ["fox", "grey wolf"]
    captions = ["a grey wolf.", "grey wolf, a grey wolf"]
    assert index.items == [
        input_files.Item("fox/c.JPEG", ["a fox.", "fox, a fox"], 0, ["some fox"]),
        input_files.Item("grey_wolf/a.jpg", captions, 1, ["some grey wolf"]),
        input_files.Item("grey_wolf/b.png", captions, 1, ["some grey wolf"]),
    ]
    assert {reason for _, reason in refused(index)} == {"misplaced file"}
    assert len(index.refused) == 2
    assert [files.read(item.key) for item in index.items] == [b"3", b"2", b"1"]


def test_imagefolder_one_level_up(tmp_path):
    files = make_zip(tmp_path / "x.zip", {"train/fox/a.jpg": b"", "train/wolf/b.jpg": b""})
    with pytest.raises(
        input_files.InputError, match="there is train/fox/a.jpg, perhaps pass --subfolder"
    ):
        input_files.index_imagefolder(files, ["{}"], None)


def test_zip_members_cannot_lead_out(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "inner").mkdir()
    names = ["../secret.jpg", "fox/../../secret.jpg", f"{tmp_path}/secret.jpg", "fox/a.jpg"]
    files = make_zip(tmp_path / "inner/x.zip", {name: b"x" for name in names})
    index = input_files.index_imagefolder(files, ["{}"], None)
    assert [item.key for item in index.items] == ["fox/a.jpg"]
    assert sorted(refused(index)) == sorted((name, "unsafe name") for name in names[:3])
    for place in (files, input_files.Files(str(tmp_path / "inner"))):
        for name in names[:3]:
            with pytest.raises(BadRecord, match="unsafe name"):
                place.read(name)
    assert sorted(path.name for path in (tmp_path / "inner").iterdir()) == ["x.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("fox/a.jpg", b"1")
        archive.writestr("fox/a.jpg", b"2")
    index = input_files.index_imagefolder(input_files.Files(str(tmp_path / "x.zip")), ["{}"], None)
    assert len(index.items) == 1
    assert refused(index) == [("fox/a.jpg", "duplicate key")]


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "MAX_IMAGE_BYTES", 10)
    (tmp_path / "a.jpg").write_bytes(b"x" * 11)
    archive = make_zip(tmp_path / "x.zip", {"a.jpg": b"x" * 11})
    for files in (archive, input_files.Files(str(tmp_path))):
        with pytest.raises(BadRecord, match="file too large: 11 bytes"):
            files.read("a.jpg")


def test_damaged_zip_member(tmp_path):
    make_zip(tmp_path / "x.zip", {"a.jpg": b"abcdefgh"})
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(b"abcdefgh", b"abcdefgx"))
    with pytest.raises(BadRecord, match="unreadable image: .*CRC"):
        input_files.Files(str(tmp_path / "x.zip")).read("a.jpg")


def test_missing_images(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for files in (make_zip(tmp_path / "x.zip", {"b.jpg": b""}), input_files.Files(str(tmp_path))):
        for name in ("a.jpg", "folder.jpg", "a" * 300, "x.zip/b.jpg"):
            with pytest.raises(BadRecord, match="missing image"):
                files.read(name)


def test_where_images_should_be(tmp_path):
    with pytest.raises(input_files.InputError, match="no such folder or zip"):
        input_files.Files(str(tmp_path / "nothing"))
    (tmp_path / "x.tar").write_bytes(b"not a zip archive")
    with pytest.raises(input_files.InputError, match="neither a folder nor a whole zip"):
        input_files.Files(str(tmp_path / "x.tar"))
    make_zip(tmp_path / "x.zip", {"images/a.jpg": b""})
    with pytest.raises(input_files.InputError, match=r"which has \['images'\]"):
        input_files.Files(str(tmp_path / "x.zip"), "image")
    with pytest.raises(input_files.InputError, match="not in"):
        input_files.Files(str(tmp_path), "image")


@pytest.mark.parametrize(
    "text",
    ["tabby cat\n\nwolf\n", "n2\twolf\nn1\ttabby cat\n", "n2=wolf\nn1 = tabby cat\n"],
)
def test_class_file(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    names = input_files.read_class_names(str(tmp_path / "classes.txt"), ["n1", "n2"])
    assert names == {"n1": "tabby cat", "n2": "wolf"}
    if "n2" in text:  # the file's order is that of the labels
        assert list(names) == ["n2", "n1"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("cat\n", "1 names for 2 class folders"),
        ("n1\tcat\nwolf\n", "'wolf' is not folder<TAB>name"),
        ("n1\tcat\nn2\t\n", "is not folder<TAB>name"),
        ("n1\tcat\n", r"not listed \['n2'\]"),
        ("n1\tcat\nn2\twolf\nn3\tfox\n", r"without a folder \['n3'\]"),
        ("n1\tcat\nn2\twolf\nn2\tfox\n", "listed 3"),
        ("crane\ncrane\n", r"\['n1', 'n2'\] have the same readable name 'crane'"),
    ],
)
def test_class_file_that_does_not_fit(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(input_files.InputError, match=message):
        input_files.read_class_names(str(tmp_path / "classes.txt"), ["n1", "n2"])


def test_class_file_that_is_not_there(tmp_path):
    with pytest.raises(input_files.InputError, match="--classes .*classes.txt"):
        input_files.read_class_names(str(tmp_path / "classes.txt"), ["n1"])
