"""Write a trained model as files that PyTorch programs load.

  python -m declip_jax.export --workdir runs/mine --format huggingface --output mine_hf --verify

Formats: open_clip (create_model_and_transforms("local-dir:DIR")), huggingface (CLIPModel and
CLIPProcessor .from_pretrained(DIR)), openai, declip and alip (the names of those programs' state
dicts). Weights are safetensors. The model is the newest checkpoint of the workdir (or --step), its
moving average if it has one. With --init a model of another program is written instead: from
DeCLIP's .pth.tar to Transformers, say.
"""

import argparse
import itertools
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from declip_jax import initial
from declip_jax.data.pipeline import eval_images
from declip_jax.data.sources import open_source
from declip_jax.data.tokenizer import EOT, tokenize
from declip_jax.interop import declip, pretrained, tables, verify, writing
from declip_jax.interop.pretrained import FORMATS, Pretrained

_IMAGES = 16  # that a model is verified with, of each kind
_LIMIT = 1e-4  # a larger difference is a mistake, not rounding


def export(
    model: Pretrained, format: str, output: Path, notes: dict[str, Any]
) -> tuple[Pretrained, list[str]]:
    """Writes a model into a new folder: all of it, or nothing.

    Args:
      model: with known mean, std and short side.
      format: one of FORMATS.
      output: does not exist, or is an empty folder.
      notes: where the model comes from.

    Returns:
      The model as it was written, and what changed on the way, in lines.

    Raises:
      ValueError: the folder is not empty, or the format cannot hold the model.
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
      model: before it was adapted to the format.
      written: as it was written.
      format: of the folder.
      folder: what `export` wrote.
      data, split: where to take real images and captions from.

    Raises:
      ValueError: it differs by more than rounding, or data that cannot be read.
    """
    if not verify.same_arrays(folder, written):
        raise ValueError(f"{folder}, read again, does not hold the same arrays.")
    print("Read again: the same arrays, bit for bit.")
    if format not in verify.LIBRARIES:
        print("No library that can be installed has this format: compared with nothing else.")
        return
    kinds = {"random": _random_inputs(model)}
    if model.model["text"]["eot_id"] == EOT:  # else texts are not those of our tokenizer
        kinds[f"{data} {split}"] = _real_inputs(model, data, split)
    found = {}
    for kind, (pixels, tokens) in kinds.items():
        try:
            other = verify.theirs(folder, format, pixels, tokens)
        except verify.NotInstalled as error:
            print(f"Not compared: {error}")
            return
        found[kind] = verify.differences(verify.ours(model, pixels, tokens), other)
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
    rng, size, text = (
        np.random.default_rng(0),
        model.model["image"]["resolution"],
        model.model["text"],
    )
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
    tokens = tokenize(
        [captions[0] for captions in batch["captions"]], model.model["text"]["context"]
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m declip_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--workdir", type=Path, help="folder of a training run")
    of.add_argument("--init", type=Path, help="weights of another program instead, see evaluate")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, help="folder to write: new, or empty")
    parser.add_argument("--step", default="newest", help="a number, 'best', or 'newest' (default)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average of the parameters; default: if there is one",
    )
    parser.add_argument(
        "--init-format", choices=FORMATS, default="", help="of --init, where names do not tell it"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="only print which array has which name: of all models, or of the one that is named",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare with the library that the format is for, if it is installed",
    )
    parser.add_argument("--data", default="scenes", help="verify: real images (default: scenes)")
    parser.add_argument("--split", default="test", help="verify: of --data (default: test)")
    args = parser.parse_args()
    if not args.list and not (args.output and (args.workdir or args.init)):
        parser.error("--output, and --workdir or --init, are needed (or --list)")
    if args.init_format and not args.init:
        parser.error("--init-format is for --init")
    if args.init and (args.step != "newest" or args.ema is not None):
        parser.error("--step and --ema are for --workdir")
    try:
        model, notes = None, {}
        if args.workdir:
            model, step, record = initial.read_run(args.workdir, args.step, args.ema)
            notes = {"step": step, "samples": record["samples"]}
            notes["ema"] = record["config"]["ema_decay"] > 0 and args.ema is not False
        elif args.init:
            model = initial.complete(initial.read(args.init, args.init_format))
        if args.list:
            adapted = model and writing.adapt(model, args.format)[0]
            print_table(args.format, adapted)
            return
        print(f"{model.describe()}.")
        for note in model.notes:
            print(f"Note: {note}.")
        written, changes = export(model, args.format, args.output, notes)
        for change in changes:
            print(f"Note: {change}.")
        sizes = sum(file.stat().st_size for file in args.output.iterdir()) / 1e6
        names = ", ".join(sorted(file.name for file in args.output.iterdir()))
        print(f"Wrote {args.output} ({sizes:,.1f} MB): {names}.")
        if args.verify:
            check(model, written, args.format, args.output, args.data, args.split)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
