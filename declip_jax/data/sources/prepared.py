"""TFDS directories of array_record shards, and those that `declip_jax.prepare` writes."""

import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import read_only_builder

from declip_jax.data import records
from declip_jax.data.records import BadRecord
from declip_jax.data.sources.base import Source, find
from declip_jax.data.sources.paths import is_remote

ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


class Shards(Source):
    """The stored records of a split of a TFDS directory.

    Raises ValueError for an unknown or empty split, and for shards that are missing or remote.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        directory = builder.data_path
        self.name = f"{directory} split {split!r}"
        check_local(str(directory))
        try:
            # Opens the shards when a process first reads from them.
            self._data = builder.as_data_source(
                split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format=ARRAY_RECORD,
            )
        except ValueError as error:
            records_of = {name: info.num_examples for name, info in builder.info.splits.items()}
            raise ValueError(
                f"split {split!r} of {directory} is unknown or empty ({error}); the records of its "
                f"splits: {records_of}"
            ) from error
        # Which of its records a shard gives: {filename, skip, take}.
        self._shards = builder.info.splits[split].file_instructions
        self.files = [shard.filename for shard in self._shards]
        present = {path.name for path in directory.iterdir()}
        missing = sorted({shard.basename() for shard in self._shards} - present)
        if missing:
            raise ValueError(f"{directory} lacks {missing}: copy or prepare the data set again.")

    def __len__(self) -> int:
        return len(self._data)

    def layout(self) -> list[Any]:
        return [*super().layout(), [(shard.skip, shard.take) for shard in self._shards]]

    def stored(self, index: int) -> bytes:
        """A record; raises BadRecord where its shard is damaged, OSError if that cannot be read."""
        try:
            return self._data[index]
        except RuntimeError as error:
            # Of the same type for all failures. Those of the disk begin with the system's call,
            # as in "open() failed: Permission denied".
            if re.match(r"\w+\(\) failed", str(error)):
                raise OSError(str(error)) from error
            raise BadRecord("unreadable record", str(error)) from error

    def locate(self, index: int) -> str:
        number, place = find(np.cumsum([0, *(shard.take for shard in self._shards)]), index)
        shard = self._shards[number]
        return f"{shard.filename}: record {shard.skip + place}"


def check_local(directory: str) -> None:
    if is_remote(directory):
        raise ValueError(
            f"{directory}: array_record files are read from local disks only. Copy or mount the "
            "folder, or use webdataset shards or Parquet files, which are read from there."
        )


def open_builder(name: str) -> tfds.core.DatasetBuilder:
    """Of a directory, or of what "tfds:NAME" names on this machine."""
    check_local(name)
    try:
        if name.startswith("tfds:"):
            # Goes by what is on disk; tfds.builder, by the version that TFDS would write today.
            return read_only_builder.builder_from_files(name.removeprefix("tfds:"))
        return tfds.builder_from_directory(name)
    except Exception as error:  # of several kinds: no directory, no such file, damaged JSON
        reason = " ".join(str(error).split())  # it has several lines
        raise ValueError(
            f"{name!r} is no TFDS data set that can be read, nor one that python -m "
            f"declip_jax.prepare wrote: {reason}"
        ) from error


class PreparedSource(Shards):
    """A split of a data set with the features of `records`; raises ValueError as `open_source`."""

    def __init__(self, directory: str, split: str):
        builder = open_builder(directory)
        if builder.info.file_format != ARRAY_RECORD:
            raise ValueError(
                f"{directory} is a data set of another kind: it has "
                f"{builder.info.file_format.value} files, expected array_record files. Write it "
                "anew with python -m declip_jax.prepare."
            )
        super().__init__(builder, split)
        present = builder.info.features
        self.class_names = tuple(present["label"].names) if "label" in present else ()

    def __getitem__(self, index: int) -> dict[str, Any]:
        stored = self.stored(index)
        try:
            return records.deserialize(stored)
        except (DecodeError, IndexError, UnicodeDecodeError) as error:
            raise BadRecord("unreadable record", f"damaged or of another kind: {error}") from error
