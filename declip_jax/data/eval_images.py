"""From a source to batches to evaluate on: every record, in order."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from declip_jax.data.image import resize_center_crop
from declip_jax.data.parallel import cores, iterate, pool
from declip_jax.data.sources import Source


def eval_images(
    source: Source, *, resolution: int, resize: int, batch_size: int, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """All records in order, in batches made ahead of use; the last may be smaller.

    Args:
      resolution: R, pixels.
      resize: the short side before the center crop, pixels.
      batch_size: B, records.
      most: at most so many records, spread evenly over the source; all of them if None.

    Returns:
      A generator of {"image": uint8 [B, R, R, 3], "captions": B lists of str, "key": B str} and, if
      the source has classes, "label": int32 [B].

    Raises ValueError: `resize` below `resolution`; while it runs, a record that cannot be read.
    """
    if resize < resolution:
        raise ValueError(f"resize={resize} is below the resolution {resolution} of the crop.")
    count = min(most or len(source), len(source))

    def make_batch(places: Sequence[int]) -> dict[str, Any]:
        indices = [place * len(source) // count for place in places]
        images = np.empty((len(indices), resolution, resolution, 3), np.uint8)

        def fill(row: int, index: int) -> dict[str, Any]:
            try:
                record = source[index]
                images[row] = resize_center_crop(record["image"], resize, resolution)
            except ValueError as error:
                raise ValueError(
                    f"{source.locate(index)} cannot be read: {error}. Evaluation needs every "
                    "record: prepare the data with python -m declip_jax.prepare, which leaves out "
                    "what cannot be decoded."
                ) from error
            return {name: value for name, value in record.items() if name != "image"}

        rows = list(pool(cores()).map(fill, range(len(indices)), indices))
        texts = {name: [row[name] for row in rows] for name in ("captions", "key")}
        batch = {"image": images, **texts}
        if source.class_names:
            batch["label"] = np.array([row["label"] for row in rows], np.int32)
        return batch

    dataset = (
        grain.MapDataset.range(count)
        .batch(batch_size, batch_fn=list)
        .map(make_batch)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    )
    return iterate(dataset)
