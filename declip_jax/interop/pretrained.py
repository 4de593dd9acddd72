"""Models of others as ours: which layout a file has, and what model it holds."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from declip_jax.digests import digest_of
from declip_jax.interop import architecture, declip, huggingface, open_clip, openai, reading, tables
from declip_jax.interop.formats import FORMATS
from declip_jax.models.tower import ImageTower
from declip_jax.models.two_towers import IMAGE_TOWERS

NOTES = "declip_jax.json"  # what `export` writes beside the weights

# Of formats with JSON beside the weights: its reader, the file about the model, that about images.
_BESIDE = {
    "open_clip": (open_clip, "open_clip_config.json", "open_clip_config.json"),
    "huggingface": (huggingface, "config.json", "preprocessor_config.json"),
}
# Of formats whose program has no choice.
ACTIVATIONS = {"openai": "quick_gelu", "declip": "quick_gelu", "alip": "gelu"}
# Options that came after digests of models had been recorded: where they are not used, they do not
# count. `bn_group_size` was there from the first.
_LATER = {
    f"image.{name}": value
    for tower in IMAGE_TOWERS.values()
    for name, value in tower.options().items()
    if name != "bn_group_size"
}


class Pretrained(NamedTuple):
    """A model that was read from a file."""

    source: Path  # where it comes from
    # One of FORMATS; "" if the names are those of OpenAI, open_clip and ALIP alike; or "declip_jax"
    # of a run.
    format: str
    method: str  # that trained it: "clip" if nothing tells of another
    layout: tables.Layout | None  # the table that it was read with; None of a run
    # {"params": …, "batch_stats": …}, float32 numpy arrays: the towers whole, and heads
    variables: dict[str, Any]
    model: dict[str, Any]  # sizes and activation, the fields of a config's `model` section
    # Those of them that the file does not tell, as "image.heads": `model` has what is usual.
    unknown: tuple[str, ...]
    mean: tuple[float, ...] | None = None  # that images are normalized with; None: not told
    std: tuple[float, ...] | None = None
    short_side: int | None = None  # pixels that images are resized to before the crop; likewise
    notes: tuple[str, ...] = ()  # what the file tells and we do otherwise, in lines

    def describe(self) -> str:
        """One line for the log."""
        image, _ = architecture.sections(self.model)
        count = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        names = self.format or "OpenAI's, open_clip's and ALIP's (the same)"
        return (
            f"{self.source}: layout {names}, {self.method}, {image.describe()}, "
            f"{image.resolution} px, embedding {self.model['embed_dim']}, {count:,} parameters"
        )

    def digest(self) -> str:
        """Of all values and settings that scores follow from."""
        settings = sorted(flatten_dict(self.model, sep=".").items() - _LATER.items())
        parts = [repr((settings, self.mean, self.std, self.short_side)).encode()]
        arrays = sorted(flatten_dict(self.variables, sep="/").items())
        values = (path.encode() + np.ascontiguousarray(leaf).data for path, leaf in arrays)
        return digest_of(itertools.chain(parts, values))


def read(path: str | Path, format: str = "") -> Pretrained:
    """Reads a model from a file or folder; see `reading.read` for which.

    Args:
      path: of the weights; JSON files of open_clip and Transformers beside them are heeded.
      format: one of FORMATS, where names do not tell it.

    Raises ValueError: what cannot be read, is of no known layout, or is not complete.
    """
    weights = reading.read(Path(path), format)
    configs = dict(weights.configs)
    if configs.get(NOTES, {}).get("weights", weights.path.name) != weights.path.name:
        del configs[NOTES]  # of another file
    try:
        return of_arrays(weights.arrays, configs, weights.path, format)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from error


def of_arrays(
    arrays: Mapping[str, np.ndarray],
    configs: Mapping[str, Mapping[str, Any]] = {},
    source: Path = Path(),
    format: str = "",
) -> Pretrained:
    """A state dict as a model; `read` without the reading."""
    # open_clip's models with "custom_text" have the text tower's arrays a level deeper.
    if "text.token_embedding.weight" in arrays:
        arrays = {name.removeprefix("text."): array for name, array in arrays.items()}
    notes = configs.get(NOTES, {})
    found, method, layout = _detect(arrays, configs, format or notes.get("format", ""))
    variables = tables.load(layout, arrays)
    # Without these it would look like another tower.
    paths = flatten_dict(variables, sep="/")
    tables.raise_missing(layout, [p for p in layout.of_every_image_tower() if p not in paths])
    model = architecture.infer(variables, found)
    unknown = dict.fromkeys(("image.heads", "text.heads", "activation"))
    known: Mapping[str, Any] = {"activation": ACTIVATIONS.get(found)}
    reader, file, _ = _BESIDE.get(found, (None, "", ""))
    if NOTES in configs:
        file, method = NOTES, notes.get("method", method)
        known = _told(file, lambda: dict(notes["model"]))
    elif file in configs:
        known = _told(file, lambda: reader.from_config(configs[file]))
    elif format == "open_clip":
        known = {"activation": "gelu"}  # where its configuration says nothing else
    for name, value in flatten_dict(dict(known), sep=".").items():
        section, _, field = name.rpartition(".")
        ours = model[section] if section else model
        value = tuple(value) if isinstance(value, list) else value
        if value is None or field in ImageTower.OF_TRAINING:
            continue
        if name in unknown or name == "text.eot_id":
            ours[field] = value
            unknown.pop(name, None)
        elif ours.get(field, value) != value:
            raise ValueError(
                f"{file} says config.model.{name}={value!r}, but the arrays are of a model with "
                f"{ours[field]!r}: it is another model's"
            )
    towers = architecture.part_of(variables, architecture.TOWERS)
    tables.check(layout, towers, architecture.towers_like(model))
    tables.raise_missing(layout, architecture.missing_of_heads(variables))
    preprocess = _preprocessing(configs, found, model["image"]["resolution"])
    return Pretrained(source, found, method, layout, variables, model, tuple(unknown), **preprocess)


def layout_of(
    format: str, kind: str, method: str = "clip", proj_bias: bool = False
) -> tables.Layout:
    """The table of a format, for an image tower of a kind and a model trained by `method`."""
    if format == "huggingface":
        return huggingface.LAYOUT
    if format == "declip":
        return declip.layout(kind, method)
    is_open_clip = format == "open_clip"
    return openai.layout(kind, proj_bias and is_open_clip, logit_bias=is_open_clip)


def _detect(
    names: Mapping[str, Any], configs: Mapping[str, Any], format: str
) -> tuple[str, str, tables.Layout]:
    """Format, method and layout. Raises ValueError if none fits, or not the one that was asked."""
    tops = {name.split(".")[0] for name in names}
    same_names = ("openai", "open_clip", "alip")
    method = "clip"
    if {"vision_model", "text_model"} <= tops:
        found = "huggingface"
    elif "visual" in tops and {"encode_text", "text_encoder"} & tops:
        found = "declip"
        method = "filip" if "image_mapping" in tops else "clip"
        if "text_encoder" in tops:
            method = "slip"
        elif "projector" in tops:
            method = f"de{method}"
    elif "visual" in tops and {"token_embedding", "transformer", "ln_final"} & tops:
        if format in same_names:
            found = format
        elif "open_clip_config.json" in configs:
            found = "open_clip"
        elif {*openai.SIZES} <= {*names}:
            found = "openai"
        else:  # a linear layer and a bias of the logits are open_clip's alone
            theirs = {"text_projection.weight", "logit_bias"} & {*names}
            found = "open_clip" if theirs else ""
        method = "alip" if found == "alip" else "clip"
    else:
        first = ", ".join(sorted(names)[:5])
        raise ValueError(
            f"no CLIP model of a known layout ({', '.join(FORMATS)}): its {len(names)} arrays are "
            f"called {first}, …"
        )
    if format and format != found:
        names_of = found or " and ".join(same_names)
        raise ValueError(f"the names are those of {names_of}, not of {format!r}")
    kind = "resnet" if any(name.startswith("visual.attnpool.") for name in names) else "vit"
    return found, method, layout_of(found, kind, method, "text_projection.weight" in names)


def _preprocessing(configs: Mapping[str, Any], format: str, resolution: int) -> dict[str, Any]:
    """Pretrained's mean, std, short_side and notes, as far as they are told."""
    reader, _, file = _BESIDE.get(format, (None, "", ""))
    file = NOTES if NOTES in configs else file

    def read() -> dict[str, Any]:
        if file == NOTES:
            found, notes = dict(configs[NOTES]["preprocess"]), ()
        else:
            found, notes = reader.preprocessing(configs[file], resolution)
        channels = {n: tuple(map(float, found[n])) for n in ("mean", "std") if found.get(n)}
        if any(len(values) != 3 for values in channels.values()):
            raise ValueError("three channels")
        side = found.get("short_side")
        if side is not None and side < resolution:
            raise ValueError(f"a short side of {side} below the model's {resolution}")
        return {**channels, "short_side": side, "notes": tuple(f"{file}: {x}" for x in notes)}

    return _told(file, read) if file in configs else {}


def _told(file: str, read: Callable[[], Any]) -> Any:
    """What `read` makes of a JSON file; an error names the file."""
    try:
        return read()
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} has another form than expected ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
