"""Random access to the records of a data set, in the formats that data sets come in."""

import difflib
import os
from collections.abc import Mapping
from typing import Any

from tensorflow_datasets import builder_from_directory

from declip_jax.data import records
from declip_jax.data.sources import paths
from declip_jax.data.sources.base import Columns, Source
from declip_jax.data.sources.derived import Mixture, part_of
from declip_jax.data.sources.prepared import PreparedSource

__all__ = ["Columns", "Mixture", "Source", "open_data", "open_source"]

_USUAL = Columns()


def open_source(name: str, split: str, columns: Columns = _USUAL, cache: str = "") -> Source:
    """Opens a data set; what it is called tells its format.

    Args:
      name: one of
        "scenes": drawn on the fly;
        a directory that `declip_jax.prepare` or TFDS wrote;
        "tfds:NAME" or "tfds:NAME/CONFIG:VERSION": a TFDS data set, prepared on this machine;
        webdataset shards: a .tar file, a pattern such as "cc12m/{00000..01242}.tar", a folder;
        Parquet files: a .parquet file, a pattern, a folder.
      split: a split's name or a part of one, such as "train[:90%]". Shards and Parquet files have
        no splits of their own: there any name stands for all, and "train[:90%]" for a part.
      columns: what the source calls its fields.
      cache: folder for the indices of shards; "": beside them, or else ~/.cache/declip_jax.

    Raises:
      ValueError: no such data set or split, no records, or files that cannot be used.
    """
    # Imported where they are needed: a run uses one of them.
    if name == "scenes":
        _check_no_columns(name, columns)
        from declip_jax.data.scenes import Scenes

        return Scenes(split)
    if name.startswith("tfds:"):
        from declip_jax.data.sources.tfds import TfdsSource

        return TfdsSource(name, split, columns)
    fs, path = paths.file_system(name)
    if fs.exists(os.path.join(path, "dataset_info.json")):
        if _is_prepared(name):
            _check_no_columns(name, columns)
            return PreparedSource(name, split)
        from declip_jax.data.sources.tfds import TfdsSource

        return TfdsSource(name, split, columns)
    inside = fs.ls(path, detail=False) if fs.isdir(path) else ()
    endings = {os.path.splitext(file)[1] for file in (name.rstrip("}"), *inside)}
    if ".tar" in endings:
        from declip_jax.data.sources.webdataset import WebDataset

        return part_of(WebDataset(name, columns, cache), split)
    if ".parquet" in endings:
        from declip_jax.data.sources.parquet import Parquet

        return part_of(Parquet(name, columns), split)
    raise ValueError(
        f"data source {name!r} is not 'scenes', 'tfds:NAME', a directory that python -m "
        "declip_jax.prepare or TFDS wrote, or .tar or .parquet files"
        + (f": that folder has {sorted(map(os.path.basename, inside))[:5]}." if inside else ".")
    )


def _check_no_columns(name: str, columns: Columns) -> None:
    for field, value in columns._asdict().items():
        if value:
            raise ValueError(
                f"config.data.columns.{field}={value!r}: the fields of {name!r} have fixed names; "
                "leave it empty, or in a mixture set it for the sources that have it."
            )


def _is_prepared(directory: str) -> bool:
    try:
        present = builder_from_directory(directory).info.features
    except Exception:  # of several kinds, which PreparedSource tells about
        return True
    return set(records.features()) <= set(present)


def open_data(data: Any) -> Source:
    """The source that `config.data` describes: one, or a mixture of several.

    Raises:
      ValueError: see `open_source` and `Mixture`; or a mixture that is written wrongly.
    """
    if not data.mixture:
        if not data.source:
            raise ValueError(
                "config.data.source is empty: name the data to train on, such as a directory that "
                "python -m declip_jax.prepare wrote, or 'scenes'."
            )
        return open_source(data.source, data.split, Columns(**data.columns), data.index_cache)
    if data.source:
        raise ValueError(
            f"config.data.source={data.source!r} and config.data.mixture are both set: clear one."
        )
    sources, weights = [], []
    for entry in data.mixture:
        _check_names(entry, ("source", "split", "weight", "columns"), "config.data.mixture")
        columns = dict(data.columns) | dict(entry.get("columns", {}))
        _check_names(columns, Columns._fields, "columns of config.data.mixture")
        if "source" not in entry:
            raise ValueError(f"config.data.mixture: {dict(entry)} has no 'source'.")
        split = entry.get("split", data.split)
        sources.append(open_source(entry["source"], split, Columns(**columns), data.index_cache))
        weights.append(entry.get("weight"))
    if None in weights:
        if any(weights):
            raise ValueError(
                "config.data.mixture: give every source a 'weight', or none, and each then has as "
                "many as it has records."
            )
        weights = list(map(len, sources))
    return Mixture(sources, weights)


def _check_names(entry: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in entry:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{where} has no field {name!r}; "
                + (f"did you mean {close[0]!r}? " if close else "")
                + f"It has {known}."
            )
