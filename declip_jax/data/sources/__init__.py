"""Random access to the records of a data set, in the formats that they come in."""

from declip_jax.data.scenes import Scenes
from declip_jax.data.sources.base import Columns, Source
from declip_jax.data.sources.prepared import PreparedSource

__all__ = ["Columns", "Source", "open_source"]

DEFAULT = Columns()


def open_source(name: str, split: str, columns: Columns = DEFAULT, cache: str = "") -> Source:
    """Opens a data set, whose format its name tells.

    Args:
      name: one of
        "scenes", drawn on the fly;
        a directory that `declip_jax.prepare` or TFDS wrote;
        "tfds:" and the name of a TFDS data set, such as "tfds:coco_captions:1.1.0";
        webdataset shards: a .tar file, a pattern such as "cc12m/{00000..01242}.tar", or a folder;
        Parquet files: a .parquet file, a pattern, or a folder.
      split: a split's name or a part of one, such as "train[:90%]". Shards and Parquet files have
        no splits of their own: of what is before the bracket nothing depends there.
      columns: what the source calls its fields.
      cache: folder for indices of shards; "" for beside them or else ~/.cache/declip_jax.

    Raises:
      ValueError: no such data set or split, no records, or files that cannot be used.
    """
    if name == "scenes":
        return Scenes(split)
    return PreparedSource(name, split)
