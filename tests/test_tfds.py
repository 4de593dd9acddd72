import io
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from declip_jax.data import records
from declip_jax.data.options import Columns
from declip_jax.data.records import BadRecord
from declip_jax.data.sources.prepared import PreparedSource
from declip_jax.data.sources.tfds import TfdsSource

F = tfds.features
USUAL = Columns()
FEATURES = {
    "image": F.Image(),
    "image/filename": F.Text(),
    "captions": F.Sequence({"id": np.int64, "text": F.Text()}),
    "objects": F.Sequence({"label": F.ClassLabel(names=["cat", "dog"]), "area": np.int64}),
    "scene": F.ClassLabel(names=["indoors", "outdoors"]),
    "number": np.int64,
}


def image(index: int) -> bytes:
    return cv2.imencode(".png", np.full((4, 4, 3), index, np.uint8))[1].tobytes()


def example(index: int) -> dict:
    """As in coco_captions, with more beside it."""
    return {
        "image": io.BytesIO(image(index)),
        "image/filename": f"{index:03d}.png",
        "captions": [{"id": i, "text": f"é {i} of {index}"} for i in range(2)],
        "objects": [{"label": i % 2, "area": i} for i in range(index % 3)],
        "scene": index % 2,
        "number": index,
    }


def write(folder, features=FEATURES, examples=example, file_format="array_record") -> str:
    """A data set with 10 examples in the 3 shards of "train", 4 in "val"; returns its directory."""

    class CocoLike(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        name = "coco_like"

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

        def _split_generators(self, downloads):
            return {"train": self._generate_examples(10), "val": self._generate_examples(4)}

        def _generate_examples(self, count):
            return ((index, examples(index)) for index in range(count))

    builder = CocoLike(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    return str(builder.data_path)


@pytest.fixture(scope="module")
def coco_like(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def damaged(tmp_path) -> tuple[str, str]:
    """A data set of its own, and one of its shards."""
    directory = write(tmp_path)
    return directory, os.path.join(directory, "coco_like-train.array_record-00001-of-00003")


def test_nested_captions(coco_like):
    source = TfdsSource(coco_like, "train", USUAL)
    assert len(source) == 10 and source.class_names == () and coco_like in str(source)
    found = sorted((source[i] for i in range(10)), key=lambda record: record["key"])
    assert found == [
        {
            "image": image(i),
            "captions": [f"é 0 of {i}", f"é 1 of {i}"],
            "key": f"{i:03d}.png",
        }
        for i in range(10)
    ]


def test_features_by_name(coco_like):
    columns = Columns(
        image="image",
        captions=("scene", "captions/text"),
        synthetic=("objects/label",),
        key="number",
        label="scene",
    )
    source = TfdsSource(coco_like, "train", columns)
    assert source.class_names == ("indoors", "outdoors")
    found = {}
    for index in range(10):
        try:
            record = source[index]
        except BadRecord as error:
            assert error.reason == "no synthetic caption"  # an image without objects
        else:
            found[record["key"]] = record
    assert sorted(found) == ["1", "2", "4", "5", "7", "8"]
    assert found["5"] == {
        "image": image(5),
        "captions": ["outdoors", "é 0 of 5", "é 1 of 5"],
        "synthetic": ["cat", "dog"],
        "key": "5",
        "label": 1,
    }


def test_parts_of_splits_and_where_their_records_are(coco_like):
    whole = TfdsSource(coco_like, "train", USUAL)
    places = [whole.locate(i) for i in range(10)]
    assert len(set(places)) == 10
    assert {place.split(": ")[0] for place in places} == {
        os.path.join(coco_like, f"coco_like-train.array_record-0000{i}-of-00003") for i in range(3)
    }
    assert places[0].endswith("00000-of-00003: record 0")
    for first, last in ((0, 3), (2, 9), (7, 10)):
        part = TfdsSource(coco_like, f"train[{first}:{last}]", USUAL)
        assert [part[i] for i in range(len(part))] == [whole[i] for i in range(first, last)]
        assert [part.locate(i) for i in range(len(part))] == places[first:last]
    assert len(TfdsSource(coco_like, "train[:90%]", USUAL)) == 9
    both = TfdsSource(coco_like, "train+val", USUAL)
    assert both[9] == whole[9] and "coco_like-val" in both.locate(13)


def test_it_is_read_by_threads_and_can_be_pickled(coco_like):
    source = TfdsSource(coco_like, "train", USUAL)
    expected = [source[i] for i in range(10)]
    source = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).integers(10, size=200)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(source.__getitem__, order)) == [expected[i] for i in order]


def test_by_name_and_without_tensorflow(coco_like):
    code = """if True:
        import sys
        from declip_jax.data.sources import Columns, open_source

        for name in ("coco_like", "coco_like:1.2.0", "coco_like:1.*.*"):
            source = open_source(f"tfds:{name}", "val", Columns(captions=["scene"]))
            print(sorted(source[i]["key"] for i in range(4)))
        for name in ("coco_like:2.0.0", "coco_like/config", "coco_captions", "../coco_like"):
            try:
                open_source(f"tfds:{name}", "val")
            except ValueError as error:
                assert f"'tfds:{name}'" in str(error) and "\\n" not in str(error), error
            else:
                raise AssertionError(name)
        assert not {"tensorflow", "torch"} & set(sys.modules)
    """
    environment = os.environ | {"TFDS_DATA_DIR": os.path.dirname(os.path.dirname(coco_like))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == 3 * ["['000.png', '001.png', '002.png', '003.png']"]


def test_usual_names(tmp_path):
    features = {
        "picture": F.Image(),
        "depth": F.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
        "mask": F.LabeledImage(labels=2, shape=(None, None, 1)),
        "caption": F.Text(),
        "synthetic": F.Sequence(F.Text()),
        "label": F.ClassLabel(names=["cat", "dog"]),
    }

    def examples(index):
        return {
            "picture": io.BytesIO(image(index)),
            "depth": io.BytesIO(b"depth"),
            "mask": io.BytesIO(b"mask"),
            "caption": f"caption {index}",
            "synthetic": ["machine"],
            "label": index % 2,
        }

    source = TfdsSource(write(tmp_path, features, examples), "val[1:]", USUAL)
    assert source.class_names == ("cat", "dog")
    for place in range(3):
        record = source[place]
        index = int(record["captions"][0].removeprefix("caption "))
        assert record == {
            "image": image(index),
            "captions": [f"caption {index}"],
            "synthetic": ["machine"],
            "key": f"val[1:]:{place}",
            "label": index % 2,
        }


def test_records_that_cannot_be_used(tmp_path):
    features = {
        "image": F.Image(),
        "text": F.Text(),
        "label": F.ClassLabel(names=["cat", "dog"]),
        "id": F.Text(),
    }
    changes = {
        "not UTF-8": {"text": b"caf\xe9"},
        "no caption": {"text": " \n"},
        "caption too long": {"text": "x" * (1 << 20) + "x"},
        "no label": {"label": -1},
        "no image": {"image": io.BytesIO(b"")},
    }

    def examples(index):
        reason = list(changes)[index % len(changes)]
        record = {"image": io.BytesIO(b"image"), "text": "a", "label": 1, "id": str(index)}
        return record | (changes[reason] if index < len(changes) else {})

    source = TfdsSource(write(tmp_path, features, examples), "train", USUAL)
    reasons, keys = set(), set()
    for index in range(10):
        try:
            keys.add(source[index]["key"])
        except BadRecord as error:
            reasons.add(error.reason)
    assert reasons == set(changes) and keys == set("56789")


def refused(name, words, split="train", columns=USUAL):
    with pytest.raises(ValueError, match=words) as raised:
        TfdsSource(str(name), split, columns)
    assert not isinstance(raised.value, BadRecord)


def test_features_that_are_missing_or_of_other_types(coco_like):
    for field in Columns().as_dict():
        nothing = ("nothing",) if field in ("captions", "synthetic") else "nothing"
        words = rf"columns.{field}: coco_like/1.2.0 has no 'nothing'.*captions/text: Sequence\(Text"
        refused(coco_like, words, columns=Columns(**{field: nothing}))
    refused(coco_like, "columns.image: .*'scene' as ClassLabel", columns=Columns(image="scene"))
    for wrong in ("image", "number", "captions/id"):
        refused(coco_like, f"columns.captions: .*'{wrong}'", columns=Columns(captions=[wrong]))
        refused(coco_like, f"columns.label: .*'{wrong}'", columns=Columns(label=wrong))
    refused(coco_like, "columns.key: .*'captions/text'", columns=Columns(key="captions/text"))


def test_no_usual_names(tmp_path):
    features = {"left": F.Image(), "right": F.Image(), "alt": F.Text()}

    def examples(index):
        return {"left": io.BytesIO(b"l"), "right": io.BytesIO(b"r"), "alt": "text"}

    directory = write(tmp_path, features, examples)
    refused(directory, "columns.image: .*none of the usual.*left: Image.*right: Image")
    refused(directory, "columns.captions: .*none of the usual", columns=Columns(image="left"))
    source = TfdsSource(directory, "val", Columns(image="right", captions=("alt",)))
    assert source[3] == {"image": b"r", "captions": ["text"], "key": "val:3"}


def test_data_sets_that_cannot_be_opened(coco_like, tmp_path):
    refused(tmp_path, f"{tmp_path}.*no TFDS data set")
    refused("gs://bucket/coco_like/1.2.0", "gs://bucket.*local disks only")
    refused(coco_like, "'test'.*'train': 10", split="test")
    refused(coco_like, "empty", split="train[:0]")
    refused(coco_like, "unknown or empty", split="train[")

    info = os.path.join(coco_like, "dataset_info.json")
    other = tmp_path / "1.2.0"
    other.mkdir()
    (other / "features.json").write_text(open(f"{coco_like}/features.json").read())
    content = open(info).read()
    (other / "dataset_info.json").write_text(content.replace('"array_record"', '"tfrecord"'))
    refused(other, f"{other} has tfrecord files.*convert_format")
    (other / "dataset_info.json").write_text(content)
    refused(other, "lacks .*coco_like-train.array_record-00000-of-00003")
    (other / "dataset_info.json").write_text(content[:-20])
    refused(other, f"{other}.*no TFDS data set")


def outcomes(source) -> list[str]:
    result = []
    for index in range(len(source)):
        try:
            result.append(type(source[index]).__name__)
        except BadRecord as error:
            result.append(error.reason)
    return result


def test_damaged_shards_are_bad_records(damaged):
    directory, shard = damaged
    content = open(shard, "rb").read()
    source = TfdsSource(directory, "train", USUAL)
    here = [shard in source.locate(index) for index in range(10)]
    expected = ["unreadable record" if is_here else "dict" for is_here in here]
    assert 0 < sum(here) < 10
    for damage in (content[:-100], b"", bytes(len(content))):
        with open(shard, "wb") as file:
            file.write(damage)
        assert outcomes(TfdsSource(directory, "train", USUAL)) == expected


def test_errors_of_the_disk_are_no_bad_records(damaged):
    directory, shard = damaged
    source = TfdsSource(directory, "train", USUAL)
    os.remove(shard)
    index = next(i for i in range(10) if shard in source.locate(i))
    with pytest.raises(OSError, match="No such file"):
        source[index]
    refused(directory, os.path.basename(shard))


def write_prepared(folder, stored: list[bytes]) -> str:
    for shard in range(2):
        path = folder / records.shard_name("set", "train", shard, 2)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for content in stored[3 * shard : 3 * shard + 3]:
            writer.write(content)
        writer.close()
    records.write_metadata(folder, "set", {"train": records.SplitSize([3, 2], 1000)}, ["a", "b"])
    return str(folder)


def prepared(index: int) -> dict:
    return {"image": image(index), "captions": ["a", "b"], "key": f"é{index}", "label": index % 2}


def test_prepared_data_are_tfds_data_too(tmp_path):
    directory = write_prepared(tmp_path, [records.serialize(prepared(i)) for i in range(5)])
    for source in (TfdsSource(directory, "train", USUAL), PreparedSource(directory, "train")):
        assert [source[i] for i in range(5)] == [prepared(i) for i in range(5)]
        assert source.class_names == ("a", "b")
    part = PreparedSource(directory, "train[60%:]")
    for index in range(2):
        assert part.locate(index).endswith(f"array_record-00001-of-00002: record {index}")


def test_prepared_records_that_are_damaged(tmp_path):
    good = records.serialize(prepared(0))
    directory = write_prepared(tmp_path, [good, good[:-3], b"", b"\xff" * 50, good])
    expected = ["dict", *3 * ["unreadable record"], "dict"]
    assert outcomes(PreparedSource(directory, "train")) == expected
