"""Random access to the records of a data set, in the formats that data sets come in."""

import contextlib
import os
import re

from declip_jax.data import records
from declip_jax.data.options import Columns, Data
from declip_jax.data.sources import paths
from declip_jax.data.sources.base import Source
from declip_jax.data.sources.mixture import Mixture
from declip_jax.data.sources.part import part_of

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
        Parquet files: a .parquet file, a pattern, a folder;
        class folders: a folder with one for each class, see `folders.ClassFolders`;
        a list of images and captions: a .json, .csv, .tsv or .jsonl file, and behind an @ the
          folder of the images if they are elsewhere, as in "dataset_coco.json@/data/coco"; see
          `captioned.Captioned`.
      split: a split's name or a part of one, such as "train[:90%]". Of a folder with a folder for
        each split, this one is opened. Where nothing tells splits, any name stands for all of the
        records, and "train[:90%]" for a part of them.
      columns: what the source calls its fields.
      cache: folder for the indices of shards; "": beside them, or else ~/.cache/declip_jax.

    Raises ValueError: no such data set or split, no records, or files that cannot be used.
    """
    # Imported where they are needed: a run uses one of them.
    if name == "scenes":
        _check_no_columns(name, columns)
        from declip_jax.data.scenes import Scenes

        return Scenes(split)
    if name.startswith("tfds:"):
        from declip_jax.data.sources.tfds import TfdsSource

        return TfdsSource(name, split, columns)
    word = split.partition("[")[0]
    if listed := re.fullmatch(r"(.+\.(?:json|jsonl|csv|tsv))(?:@(.+))?", name):
        from declip_jax.data.sources.captioned import Captioned

        return part_of(Captioned(listed[1], listed[2] or "", word, columns), split)
    fs, path = paths.file_system(name)
    if fs.exists(os.path.join(path, "dataset_info.json")):
        if _is_prepared(name):
            _check_no_columns(name, columns)
            from declip_jax.data.sources.prepared import PreparedSource

            return PreparedSource(name, split)
        from declip_jax.data.sources.tfds import TfdsSource

        return TfdsSource(name, split, columns)
    suffix, files = _suffix(name), name
    if word and not suffix:
        files = os.path.join(name, word)
        suffix = _suffix(files)
    if suffix == ".tar":
        from declip_jax.data.sources.webdataset import WebDataset

        return part_of(WebDataset(_of_split(files, word, suffix), columns, cache), split)
    if suffix == ".parquet":
        from declip_jax.data.sources.parquet import Parquet

        return part_of(Parquet(_of_split(files, word, suffix), columns), split)
    if not paths.is_remote(name) and os.path.isdir(name):
        from declip_jax.data.sources.folders import ClassFolders, subfolders

        if subfolders(name):
            _check_no_columns(name, columns)
            return part_of(ClassFolders(name, word), split)
    inside = fs.ls(path, detail=False) if fs.isdir(path) else ()
    if inside:
        problem = f"that folder has {sorted(map(os.path.basename, inside))[:5]}"
    elif re.search(r"\.(tar\.\w+|tgz)$", name):
        problem = "of a compressed tar no record can be read alone; unpack it to .tar"
    else:
        problem = "there is no such file or folder, or it is empty"
    raise ValueError(
        f"data source {name!r} is not 'scenes', 'tfds:NAME', a directory that python -m "
        f"declip_jax.prepare or TFDS wrote, .tar or .parquet files, class folders, or a .json, "
        f".csv, .tsv or .jsonl file: {problem}."
    )


def _suffix(name: str) -> str | None:
    """Of the files that a name, pattern or folder stands for, if it is one that can be read."""
    for suffix in (".tar", ".parquet"):
        if name.rstrip("}").endswith(suffix):
            return suffix  # what is missing of them is told when they are opened
    for suffix in (".tar", ".parquet"):
        with contextlib.suppress(ValueError):
            if all(file.endswith(suffix) for file in paths.expand(name, suffix)):
                return suffix
    return None


def _of_split(name: str, word: str, suffix: str) -> str:
    """Of a folder with files of several splits, as Hugging Face names them, those of one."""
    fs, path = paths.file_system(name)
    if not fs.isdir(path):
        return name
    files = [os.path.basename(file) for file in fs.ls(path, detail=False)]
    named = [re.fullmatch(rf"(\w+)-\d+-of-\d+(-\w+)?{re.escape(suffix)}", file) for file in files]
    splits = sorted({match[1] for match in named if match})
    if not splits:
        return name
    if word not in splits:
        raise ValueError(f"{name!r} has no files of the split {word!r}, only of {splits}.")
    return os.path.join(name, f"{word}-*-of-*{suffix}")


def _check_no_columns(name: str, columns: Columns) -> None:
    for field, value in columns.as_dict().items():
        if value:
            raise ValueError(
                f"config.data.columns.{field}={value!r}: the fields of {name!r} have fixed names; "
                "leave it empty."
            )


def _is_prepared(directory: str) -> bool:
    """Whether it has the features that `prepare` writes, by name and kind."""
    from declip_jax.data.sources.prepared import open_builder

    present = open_builder(directory).info.features
    return all(
        name in present and present[name].get_tensor_info() == feature.get_tensor_info()
        for name, feature in records.features().items()
    )


def open_data(data: Data) -> Source:
    """The source that `config.data` describes: one, or a mixture of several; ValueError if none."""
    if data.source:
        return open_source(data.source, data.split, data.columns, data.index_cache)
    if not data.mixture:
        raise ValueError(
            "config.data.source is empty: name the data to train on, such as a directory that "
            "python -m declip_jax.prepare wrote, or 'scenes'."
        )
    sources = []
    for share in data.mixture:
        split = data.split if share.split is None else share.split
        columns = data.columns_of(share)
        sources.append(open_source(share.source, split, columns, data.index_cache))
    weights = [share.weight for share in data.mixture]
    return Mixture(sources, list(map(len, sources)) if None in weights else weights)
