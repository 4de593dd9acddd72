"""A model as files of another program, written whole and compared with what that program reads."""

import itertools
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from declip_jax.data.eval_images import eval_images
from declip_jax.data.sources import open_source
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.interop import declip, pretrained, tables, verify, writing
from declip_jax.interop.pretrained import Pretrained

_IMAGES = 16  # that a model is verified with, of each kind
_LIMIT = 1e-4  # a larger difference is a mistake, not rounding


def export(
    model: Pretrained, format: str, output: Path, notes: dict[str, Any]
) -> tuple[Pretrained, list[str]]:
    """Writes a model into a new folder: all of it, or nothing.

    Args:
      model: with known mean, std and short side.
      format: one of FORMATS.
      output: a folder that does not exist, or is empty.
      notes: where the model comes from.

    Returns:
      The model as it was written, and what changed on the way, in lines.

    Raises ValueError: the folder is not empty, or the format cannot hold the model.
    """
    output = output.resolve()  # a link to an empty folder is one
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output={output} is not empty: nothing was written; choose another.")
    model, changes = writing.adapt(model, format)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f"{output.name}.{uuid.uuid4().hex}.tmp")
    folder.mkdir()
    try:
        writing.write(folder, model, format, notes)
        folder.rename(output)  # onto an empty folder too, but not onto one with files
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return model, changes


def check(
    model: Pretrained, written: Pretrained, format: str, folder: Path, data: str, split: str
) -> None:
    """Prints how an exported folder compares with the model it was written from.

    Args:
      model, written: before it was adapted to the format, and as `export` wrote it to `folder`.
      data, split: where to take real images and captions from.

    Raises ValueError: it differs by more than rounding, or data that cannot be read.
    """
    if not verify.same_arrays(folder, written):
        raise ValueError(f"{folder}, read again, does not hold the same arrays.")
    print("Read again: the same arrays, bit for bit.")
    if format not in verify.LIBRARIES:
        print("No library that can be installed has this format: compared with nothing else.")
        return
    kinds = {"random": _random_inputs(model)}
    if model.model["text"]["eot_id"] == CLIP_TOKENIZER.end:  # else it had another tokenizer
        kinds[f"{data} {split}"] = _real_inputs(model, data, split)
    found = {}
    for kind, inputs in kinds.items():
        try:
            other = verify.theirs(folder, format, *inputs)
        except verify.NotInstalled as error:
            print(f"Not compared: {error}")
            return
        found[kind] = verify.differences(verify.ours(model, *inputs), other)
    print(f"Largest difference to {verify.version(format)}, of unit features and, of logits,")
    print("as a share of the largest logit:")
    width = max(map(len, kinds))
    print(f"  {'':8}" + "".join(f"{kind:>{width + 2}}" for kind in kinds))
    for name in verify.Features._fields:
        print(f"  {name:8}" + "".join(f"{found[kind][name]:>{width + 2}.1e}" for kind in kinds))
    if not all(value <= _LIMIT for values in found.values() for value in values.values()):
        raise ValueError(f"{folder}, which stays, does not compute what the model does: see above.")


def _random_inputs(model: Pretrained) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, H, W, 3], int32 [N, L]."""
    size, text = model.model["image"]["resolution"], model.model["text"]
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(_IMAGES, size, size, 3)).astype(np.float32)
    tokens = np.zeros((_IMAGES, text["context"]), np.int32)
    for row, length in zip(tokens, rng.integers(1, text["context"], _IMAGES), strict=True):
        row[:length] = rng.integers(1, text["eot_id"] - 1, length)
        row[length] = text["eot_id"]
    return pixels, tokens


def _real_inputs(model: Pretrained, data: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    size = model.model["image"]["resolution"]
    source = open_source(data, split)
    reading = dict(resolution=size, resize=model.short_side, batch_size=_IMAGES, most=_IMAGES)
    batch = next(iter(eval_images(source, **reading)))
    pixels = (batch["image"] / np.float32(255) - np.float32(model.mean)) / np.float32(model.std)
    first = [captions[0] for captions in batch["captions"]]
    tokens = CLIP_TOKENIZER.encode(first, model.model["text"]["context"])
    return pixels.astype(np.float32), tokens


def print_table(format: str, model: Pretrained | None) -> None:
    """Prints the mapping of a format: its entries, or the arrays of a model."""
    if model is not None:
        rows = list(tables.table(writing.table_of(model, format), model.variables))
    else:
        every = itertools.product(("vit", "resnet"), declip.METHODS, (False, True))
        layouts = (pretrained.layout_of(format, *variant) for variant in every)
        rows = list(dict.fromkeys(row for layout in layouts for row in tables.table(layout)))
    width = max(len(ours) for ours, _, _ in rows)
    for ours, theirs, change in rows:
        print(f"{ours:<{width}}  {theirs}" + (f"  ({change})" if change else ""))
