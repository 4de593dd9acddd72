"""Name tables between our variables and a PyTorch state dict, used in both directions.

A layout is a list of entries. An entry pairs a path of ours with a name of theirs and says how the
array changes on the way. Both may hold placeholders, which stand for a whole number each:

    Entry("params/image/conv{n}/kernel", "visual.conv{n}.weight", CONV)
    Entry("params/text/blocks/ln_1/scale", "transformer.resblocks.{i}.ln_1.weight", SAME)

`{i}` in theirs alone is the layer: ours is stacked over layers on axis 0, theirs is one array a
layer.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Transform(NamedTuple):
    """A bijection between their array (of one layer) and ours."""

    forward: Callable[[np.ndarray], np.ndarray]  # theirs -> ours
    inverse: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
CONV = Transform(  # OIHW <-> HWIO
    lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
SCALAR = Transform(lambda x: x.reshape(()), lambda x: x.reshape(1))  # [1] <-> []


class Entry(NamedTuple):
    ours: str
    theirs: str
    transform: Transform


class Layout(NamedTuple):
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()  # regular expressions: names of theirs without a counterpart


class _Place(NamedTuple):
    """Where a variable of ours lies in their state dict."""

    transform: Transform
    names: list[str]
    stacked: bool  # one name for each row of axis 0


def load(layout: Layout, state_dict: Mapping[str, np.ndarray], like: Any) -> Any:
    """Their state dict as our variables.

    Args:
      state_dict: arrays by name.
      like: our variables, as arrays or ShapeDtypeStructs: the structure, shapes and dtypes wanted.

    Returns:
      A tree like `like` of numpy arrays.

    Raises:
      ValueError: names that are missing, names that nothing takes and arrays of another shape, all
        of them listed; or variables of ours that the layout has no name for.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    unused = {n for n in state_dict if not any(re.fullmatch(p, n) for p in layout.ignored)}
    missing, misshaped, values = [], [], []
    for leaf, place in zip((leaf for _, leaf in leaves), _places(layout, leaves), strict=True):
        shape = leaf.shape[1:] if place.stacked else leaf.shape
        wanted = jax.eval_shape(
            place.transform.inverse, jax.ShapeDtypeStruct(shape, leaf.dtype)
        ).shape
        value = np.empty(leaf.shape, leaf.dtype)
        for row, name in enumerate(place.names):
            unused.discard(name)
            if name not in state_dict:
                missing.append(name)
            elif state_dict[name].shape != wanted:
                misshaped.append(f"{name} has shape {state_dict[name].shape}, expected {wanted}")
            else:
                value[row if place.stacked else ...] = place.transform.forward(state_dict[name])
        values.append(value)
    problems = {"missing": missing, "unexpected": sorted(unused), "of another shape": misshaped}
    if any(problems.values()):
        raise ValueError(
            "the state dict does not fit the model:"
            + "".join(f"\n{what}: {', '.join(names)}" for what, names in problems.items() if names)
        )
    return jax.tree_util.tree_unflatten(structure, values)


def dump(layout: Layout, variables: Any) -> dict[str, np.ndarray]:
    """Our variables, or any part of them (gradients, say), under their names; undoes `load`.

    Raises:
      ValueError: variables that the layout has no name for.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    state_dict = {}
    for (_, leaf), place in zip(leaves, _places(layout, leaves), strict=True):
        leaf = np.asarray(leaf)
        for name, value in zip(place.names, leaf if place.stacked else [leaf], strict=True):
            state_dict[name] = np.array(place.transform.inverse(value), order="C")
    return state_dict


def _places(layout: Layout, leaves: list[tuple[Any, Any]]) -> list[_Place]:
    """The place of every (path, leaf)."""
    # "conv{n}/kernel" -> "conv(?P<n>[0-9]+)/kernel"; re.escape leaves "/" and "_" alone
    patterns = [
        re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(entry.ours)))
        for entry in layout.entries
    ]
    places, unknown = [], []
    for path, leaf in leaves:
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        for entry, pattern in zip(layout.entries, patterns, strict=True):
            if found := pattern.fullmatch(path):
                stacked = "{i}" in entry.theirs and "i" not in found.groupdict()
                names = [
                    entry.theirs.format(**found.groupdict(), **({"i": row} if stacked else {}))
                    for row in range(leaf.shape[0] if stacked else 1)
                ]
                places.append(_Place(entry.transform, names, stacked))
                break
        else:
            unknown.append(path)
    if unknown:
        raise ValueError(f"the layout has no name for: {', '.join(unknown)}")
    return places
