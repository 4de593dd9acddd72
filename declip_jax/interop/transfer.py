"""A model that was read, as a run or an evaluation wants it: other sizes, other heads."""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from declip_jax.interop import tables
from declip_jax.interop.architecture import TOWERS, part_of, sections
from declip_jax.interop.pretrained import Pretrained
from declip_jax.models.tower import ImageTower
from declip_jax.models.two_towers import Model

TOKENS = ("params", "text", "token_embedding", "embedding")


def fit(
    pretrained: Pretrained, like: Mapping[str, Any], model: Any, resize: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """What a run takes of a pretrained model.

    The towers and the logit scale are taken whole. A method's head is taken whole where both have
    it, and else is not.

    Args:
      pretrained: from `pretrained.read`.
      like: {"params": …, "batch_stats": …} of the run, arrays or ShapeDtypeStructs.
      model: the run's `config.model`, or the `Model` read of it.
      resize: interpolate the positions to the run's image size, cut or interpolate those of words
        to its context.

    Returns:
      A part of a tree like `like`, of numpy arrays; its token embedding may have fewer rows, the
      first. And what there is to tell about it, in lines.

    Raises:
      ValueError: another architecture, by field; arrays that are missing, unexpected or misshapen,
        all of them by name.
    """
    model = Model.read(model, "config.model")
    if differences := _differences(pretrained, model, resize):
        raise ValueError(
            f"{pretrained.source} holds another model than the configuration describes:\n  "
            + "\n  ".join(differences)
        )
    notes = list(pretrained.notes)
    if resize:
        pretrained, lines = resized(pretrained, model.image.resolution, model.text.context)
        notes += lines
    heads = {*like["params"]} - {*TOWERS}
    theirs = {*pretrained.variables["params"]} - {*TOWERS}
    shared = {*TOWERS, *(heads & theirs)}
    taken, wanted = part_of(pretrained.variables, shared), flatten_dict(part_of(like, shared))
    rows, table = pretrained.model["text"]["vocab_size"], wanted[TOKENS]
    if rows < table.shape[0]:
        wanted[TOKENS] = jax.ShapeDtypeStruct((rows, table.shape[1]), table.dtype)
        missing = f"{rows} … {table.shape[0] - 1}"
        notes.append(f"tokens {missing} are not in it: new (the mask is such a token)")
    tables.check(pretrained.layout, taken, unflatten_dict(wanted))
    if pretrained.unknown:
        values = ", ".join(f"{n}={operator.attrgetter(n)(model)!r}" for n in pretrained.unknown)
        notes.append(f"not told by the file, taken from the configuration: {values}")
    for names, what in ((heads - theirs, "not in it, start anew"), (theirs - heads, "left out")):
        if names:
            notes.append(f"{what}: {', '.join(sorted(names))}")
    return taken, notes


def resized(pretrained: Pretrained, resolution: int, context: int) -> tuple[Pretrained, list[str]]:
    """A model for another image size and another number of tokens.

    Positions of patches (or of a ResNet's cells) are interpolated as images are, cubic and
    anti-aliased. For fewer tokens the first positions stay, so that captions which fit keep their
    features; for more they are interpolated linearly. All but the cutting are open_clip's ways.

    Returns:
      The model, and what was done, in lines.

    Raises ValueError: an image size that patches do not fill, or less than three tokens.
    """
    params, notes = dict(pretrained.variables["params"]), []
    image, text = sections(pretrained.model)
    step = image.step
    if resolution < step or resolution % step:
        raise ValueError(f"an image size of {resolution} px is no multiple of {step}, a patch's.")
    if context < 3:
        raise ValueError(f"a context of {context} tokens leaves no room for a word: at least 3.")
    if resolution != image.resolution:
        fitted = image.resize(params["image"], resolution)
        if fitted is not params["image"]:
            old, new = image.side, resolution // step
            notes.append(
                f"positions of {old}×{old} patches were interpolated to {new}×{new}, for "
                f"{resolution} px"
            )
        params["image"] = fitted
    if context != text.context:
        positions, done = params["text"]["positional_embedding"][:context], "cut"
        if context > text.context:
            shape, done = (context, positions.shape[1]), "interpolated"
            positions = np.asarray(jax.image.resize(positions, shape, "linear", antialias=False))
        notes.append(f"positions of {text.context} tokens were {done} to {context}")
        params["text"] = {**params["text"], "positional_embedding": positions}
    side = pretrained.short_side
    return pretrained._replace(
        variables={**pretrained.variables, "params": params},
        model={
            **pretrained.model,
            "image": {**image.as_dict(), "resolution": resolution},
            "text": {**text.as_dict(), "context": context},
        },
        short_side=side and round(side * resolution / image.resolution),
    ), notes


def _differences(pretrained: Pretrained, model: Model, resize: bool) -> list[str]:
    """Lines "field: in the file, in the configuration" of what makes another model."""
    lines, ours = [], flatten_dict(model.as_dict(), sep=".")
    image, text = sections(pretrained.model)
    theirs = {**pretrained.model, "image": image.as_dict(), "text": text.as_dict()}
    for name, value in flatten_dict(theirs, sep=".").items():
        own = ours.get(name, "absent")
        fits = own == value or (name == "text.vocab_size" and own > value)
        if (
            fits
            or name in pretrained.unknown
            or name.removeprefix("image.") in ImageTower.OF_TRAINING
        ):
            continue
        hint = f"set config.model.{name}={value}"
        if name in ("image.resolution", "text.context"):
            if resize:
                continue
            hint += ", or config.init_resize=True"
        lines.append(f"config.model.{name}: {value!r} in it, {own!r} in the configuration: {hint}")
    return lines
