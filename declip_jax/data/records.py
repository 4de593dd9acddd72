"""The record of a prepared data set: one encoded image with all its captions, and how it is stored.

A prepared data set is a TFDS directory of array_record shards, so `tfds.builder_from_directory`
opens it like any other. A stored record is a `tf.train.Example`. Writing and reading go through
TFDS' own protocol buffers and need no TensorFlow.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from declip_jax.files import publish

# TFDS takes a second to import, and most of a run's processes read no array_record files: here and
# elsewhere it is imported by what needs it.
if TYPE_CHECKING:
    import tensorflow_datasets as tfds

Record = dict[str, Any]


class BadRecord(ValueError):
    """A record, or part of one, that cannot be used: `reason` is counted, `detail` is listed."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both, for it crosses processes
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class SplitSize(NamedTuple):
    shard_lengths: Sequence[int]  # records in each shard
    num_bytes: int  # stored bytes of all records together


def features(
    class_names: Sequence[str] = (), synthetic: bool = False
) -> tfds.features.FeaturesDict:
    """The TFDS schema of a record, labeled if there are class names; ValueError for equal ones."""
    import tensorflow_datasets as tfds

    schema = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "key": tfds.features.Text(),
    }
    if synthetic:
        schema["synthetic"] = tfds.features.Sequence(tfds.features.Text())
    if class_names:
        schema["label"] = tfds.features.ClassLabel(names=list(class_names))
    return tfds.features.FeaturesDict(schema)


def serialize(record: Record) -> bytes:
    """{"image": bytes, "captions": [str, ...], "key": str} -> bytes.

    Optional are "label": int and "synthetic": [str, ...]. The same record always gives the same
    bytes.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(record["image"])
    feature["captions"].bytes_list.value.extend(text.encode() for text in record["captions"])
    feature["key"].bytes_list.value.append(record["key"].encode())
    if "synthetic" in record:
        feature["synthetic"].bytes_list.value.extend(text.encode() for text in record["synthetic"])
    if "label" in record:
        feature["label"].int64_list.value.append(record["label"])
    # The fields are a map, which protocol buffers otherwise write in any order.
    return example.SerializeToString(deterministic=True)


def deserialize(serialized: bytes) -> Record:
    """The inverse of `serialize`; the image stays encoded."""
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(serialized).features.feature
    record = {
        "image": feature["image"].bytes_list.value[0],
        "captions": [text.decode() for text in feature["captions"].bytes_list.value],
        "key": feature["key"].bytes_list.value[0].decode(),
    }
    if "synthetic" in feature:
        record["synthetic"] = [text.decode() for text in feature["synthetic"].bytes_list.value]
    if "label" in feature:
        record["label"] = feature["label"].int64_list.value[0]
    return record


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
    """The file name TFDS expects of shard `shard` (from 0) of `shards`."""
    return f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def write_metadata(
    directory: str | os.PathLike,
    name: str,
    splits: Mapping[str, SplitSize],
    class_names: Sequence[str] = (),
    synthetic: bool = False,
    scratch: str | os.PathLike | None = None,
) -> None:
    """Writes features.json, dataset_info.json and, with classes, label.labels.txt.

    These files name all splits at once and replace those of an earlier call, each atomically. Until
    they are whole they are in a folder in `scratch`, on the same file system; None is `directory`.
    `tfds.folder_dataset.write_metadata` is not used because it insists on describing every shard it
    finds in the directory and writes in place.
    """
    import tensorflow_datasets as tfds

    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=""
        ),
        features=features(class_names, synthetic),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(
        data_dir=Path(directory), dataset_name=name, filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=list(size.shard_lengths),
            num_bytes=size.num_bytes,
            filename_template=template.replace(split=split),
        )
        for split, size in splits.items()
    ]
    info.set_splits(tfds.core.SplitDict(infos))
    with tempfile.TemporaryDirectory(dir=scratch or directory) as folder:
        info.write_to_directory(folder)
        # dataset_info.json last: without it, TFDS sees no data set.
        for path in sorted(Path(folder).iterdir(), key=lambda p: p.name == "dataset_info.json"):
            publish(path, Path(directory) / path.name)
