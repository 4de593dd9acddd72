import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from declip_jax.data import records


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def record(number: int, **more) -> dict:
    return {
        "image": png(number),
        "captions": [f"{number}", "Café ☕"],
        "key": f"é/{number}",
        **more,
    }


SYNTHETIC = {"synthetic": ["a dog", "Café"]}


@pytest.mark.parametrize("more", [{}, {"label": 0}, {"label": 3}, SYNTHETIC])
def test_serialize_and_back(more):
    assert records.deserialize(records.serialize(record(1, **more))) == record(1, **more)


def test_field_order_does_not_matter():
    fields = record(1, label=2, **SYNTHETIC)
    backwards = dict(reversed(fields.items()))
    assert records.serialize(backwards) == records.serialize(fields)


def test_tfds_reads_what_was_written(tmp_path):
    # The middle shard is empty, as when all its images were refused.
    shards = [
        [record(0, label=1, **SYNTHETIC), record(1, label=0, **SYNTHETIC)],
        [],
        [record(2, label=1, **SYNTHETIC)],
    ]
    for number, shard in enumerate(shards):
        writer = ArrayRecordWriter(
            str(tmp_path / records.shard_name("birds", "val", number, 3)), "group_size:1"
        )
        for fields in shard:
            writer.write(records.serialize(fields))
        writer.close()
    records.write_metadata(
        tmp_path, "birds", {"val": records.SplitSize([2, 0, 1], 10)}, ["owl", "barn owl"], True
    )

    builder = tfds.builder_from_directory(tmp_path)
    assert builder.info.features["label"].names == ["owl", "barn owl"]
    source = builder.as_data_source("val", decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == 3
    for number, label in enumerate([1, 0, 1]):
        read, expected = source[number], record(number, label=label)
        assert read["image"] == expected["image"]
        assert [text.decode() for text in read["captions"]] == expected["captions"]
        assert [text.decode() for text in read["synthetic"]] == SYNTHETIC["synthetic"]
        assert read["key"].decode() == expected["key"]
        assert read["label"] == expected["label"]
    # Without SkipDecoding, TFDS decodes the image.
    assert builder.as_data_source("val")[0]["image"].shape == (5, 7, 3)
    assert "tensorflow" not in sys.modules


def test_metadata_of_a_second_split_replaces_the_first(tmp_path):
    sizes = {"train": records.SplitSize([4, 5], 90)}
    records.write_metadata(tmp_path, "birds", sizes)
    sizes["test"] = records.SplitSize([3], 30)
    records.write_metadata(tmp_path, "birds", sizes)
    splits = tfds.builder_from_directory(tmp_path).info.splits
    assert {name: split.num_examples for name, split in splits.items()} == {"train": 9, "test": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dataset_info.json",
        "features.json",
    ]


def test_class_names_must_differ():
    with pytest.raises(ValueError, match="duplicated"):
        records.features(["crane", "crane"])
