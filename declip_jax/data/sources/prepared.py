"""The array_record data sets that `declip_jax.prepare` writes."""

import os
from typing import Any

import tensorflow_datasets as tfds

from declip_jax.data import records
from declip_jax.data.sources.base import Source


class PreparedSource(Source):
    """A split of a TFDS directory of array_record shards, with the features of `records`.

    Raises:
      ValueError: see `open_source`.
    """

    def __init__(self, directory: str, split: str):
        self._name = f"{directory} split {split!r}"
        try:
            builder = tfds.builder_from_directory(directory)
        except Exception as error:  # of several kinds: no directory, no such file, damaged JSON
            raise ValueError(
                f"data source {directory!r} is neither 'scenes' nor a data set that python -m "
                f"declip_jax.prepare wrote: {error}"
            ) from error
        expected, present = records.features(), builder.info.features
        missing = sorted(set(expected) - set(present))
        if missing or builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise ValueError(
                f"{directory} is a data set of another kind: it has the features "
                f"{sorted(present)} in {builder.info.file_format.value} files, expected "
                f"{sorted(expected)} in array_record files. Write it anew with python -m "
                "declip_jax.prepare."
            )
        try:
            # Opens the shards when a process first reads from them.
            self._data = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except ValueError as error:
            records_of = {name: info.num_examples for name, info in builder.info.splits.items()}
            raise ValueError(
                f"split {split!r} of {directory} is unknown or empty ({error}); the records of its "
                f"splits: {records_of}"
            ) from error
        shards = {os.path.basename(path) for path in builder.info.splits[split].filepaths}
        missing = sorted(shards - {path.name for path in builder.data_path.iterdir()})
        if missing:
            raise ValueError(f"{directory} lacks {missing}: copy or prepare the data set again.")
        self.class_names = tuple(present["label"].names) if "label" in present else ()

    def __str__(self) -> str:
        return self._name

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return records.deserialise(self._data[index])
