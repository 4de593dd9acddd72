"""TFDS data sets in array_record files, whatever their features are called."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from declip_jax.data.options import Columns
from declip_jax.data.records import BadRecord
from declip_jax.data.sources.fields import checked_record, choose
from declip_jax.data.sources.prepared import ARRAY_RECORD, Shards, open_builder

# Where `Columns` names nothing, the first of these that is there and fits.
_CAPTIONS = ("captions", "captions/text", "caption", "texts", "text")
_KEYS = ("key", "id", "image/filename", "filename", "file_name", "image/id", "image_id")


class TfdsSource(Shards):
    """A split of a TFDS data set that was prepared on this machine. Nothing is downloaded.

    Args:
      name: a directory with dataset_info.json; or "tfds:NAME/CONFIG:VERSION", without the last two
        where there is no choice, which is looked for in $TFDS_DATA_DIR or ~/tensorflow_datasets.
      split: a split's name or a part of one, as TFDS takes them.
      columns: the features to read, by paths such as "captions/text". Captions are texts or class
        labels, for which the class's name stands, either alone or in a Sequence.

    Raises:
      ValueError: no such data set, split or feature, features of other types, or files that are
        not array_record or not on a local disk.
    """

    def __init__(self, name: str, split: str, columns: Columns):
        builder = open_builder(name)
        if ARRAY_RECORD not in builder.info.available_file_formats():
            raise ValueError(
                f"{builder.data_path} has {builder.info.file_format.value} files, of which no "
                "record can be read alone: convert them with tfds convert_format "
                "--out_file_format=array_record, or write them anew with "
                "download_and_prepare and file_format='array_record'."
            )
        super().__init__(builder, split)
        self._split = split
        present = dict(sorted(_features(builder.info.features)))
        pick = functools.partial(choose, columns, present, builder.info.full_name)
        texts = "texts or class labels, alone or in one Sequence"
        is_text = _is_any("text", "class", depth=1)
        (self._image,) = pick("image", ("image",), _is_any("image"), "an Image of 8 bits")
        self._captions = pick("captions", _CAPTIONS, is_text, texts)
        self._synthetic = pick("synthetic", ("synthetic",), is_text, texts)
        is_key = _is_any("text", "class", "integer")
        self._key = pick("key", _KEYS, is_key, "a text or an integer")
        self._label = pick("label", ("label",), _is_any("class"), "a ClassLabel")
        self._names = {
            path: tuple(present[path].type.names)
            for path in (*self._captions, *self._synthetic, *self._label)
            if present[path].kind() == "class"
        }
        for path in self._label:
            self.class_names = self._names[path]

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            # {path: values}, as TFDS stores it. TFDS' own reader would decode all features.
            values = tf_example_pb2.Example.FromString(self.stored(index)).features.feature
        except DecodeError as error:
            raise BadRecord("unreadable record", str(error)) from error
        keys = [f"{self._split}:{index}".encode()]
        for path in self._key:
            numbers = (str(number).encode() for number in values[path].int64_list.value)
            keys = [*values[path].bytes_list.value, *numbers, *keys]
        record = checked_record(
            next(iter(values[self._image].bytes_list.value), None),
            self._texts(values, self._captions),
            next(filter(None, keys)),
            self._texts(values, self._synthetic) if self._synthetic else None,
        )
        for path in self._label:
            label = next(iter(values[path].int64_list.value), -1)
            if not 0 <= label < len(self.class_names):
                raise BadRecord("no label", f"{label} of {len(self.class_names)} classes")
            record["label"] = label
        return record

    def _texts(self, values: Mapping[str, Any], paths: Sequence[str]) -> Iterator[bytes]:
        for path in paths:
            yield from values[path].bytes_list.value
            names = self._names.get(path, ())
            for label in values[path].int64_list.value:
                if 0 <= label < len(names):
                    yield names[label].encode()


class _Feature(NamedTuple):
    type: tfds.features.FeatureConnector
    depth: int  # Sequences around it

    def kind(self) -> str:
        """What its values are, in one word; "" for any that are not read."""
        # Not its subclasses: the pixels of a LabeledImage are classes.
        if type(self.type) is tfds.features.Image:
            return "image" if self.type.np_dtype == np.uint8 else ""
        if isinstance(self.type, tfds.features.ClassLabel):
            return "class"
        if not isinstance(self.type, tfds.features.Tensor):
            return ""
        if self.type.np_dtype == np.object_:
            return "text"
        return "integer" if np.issubdtype(self.type.np_dtype, np.integer) else ""

    def __str__(self) -> str:
        return "Sequence(" * self.depth + str(self.type) + ")" * self.depth


def _features(
    feature: tfds.features.FeatureConnector, path: str = "", depth: int = 0
) -> Iterator[tuple[str, _Feature]]:
    """The features that hold values, by path."""
    if isinstance(feature, tfds.features.FeaturesDict):
        for name, inner in feature.items():
            yield from _features(inner, f"{path}/{name}" if path else name, depth)
    elif type(feature) is tfds.features.Sequence:  # and not a Video, say, which is one too
        yield from _features(feature.feature, path, depth + 1)
    else:
        yield path, _Feature(feature, depth)


def _is_any(*kinds: str, depth: int = 0) -> Callable[[_Feature], bool]:
    return lambda feature: feature.kind() in kinds and feature.depth <= depth
