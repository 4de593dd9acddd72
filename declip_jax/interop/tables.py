"""Name tables between our variables and a PyTorch state dict, used in both directions.

A layout is a list of entries. An entry pairs a path of ours with a name of theirs and says how the
array changes on the way. Both may hold placeholders, which stand for a whole number each:

    Entry("params/image/conv{n}/kernel", ("visual.conv{n}.weight",), CONV)
    Entry("params/text/blocks/ln_1/scale", ("transformer.resblocks.{i}.ln_1.weight",), SAME)

`{i}` in theirs alone is the layer: ours is stacked over layers on axis 0, theirs is one array a
layer. Where theirs is several names, one array of ours is theirs one below the other (axis 0).
"""

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


class Transform(NamedTuple):
    """A bijection between their array (of one layer) and ours, and what it is called."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]  # theirs -> ours
    inverse: Callable[[np.ndarray], np.ndarray]


SAME = Transform("", lambda x: x, lambda x: x)
LINEAR = Transform("[out, in] <-> [in, out]", lambda x: x.T, lambda x: x.T)
CONV = Transform(
    "OIHW <-> HWIO", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
SCALAR = Transform("[1] <-> []", lambda x: x.reshape(()), lambda x: x.reshape(1))


class Entry(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    transform: Transform

    @property
    def stacked(self) -> bool:
        """Ours holds all layers."""
        return "{i}" in self.theirs[0] and "{i}" not in self.ours

    @property
    def stack(self) -> str:
        """What the names of all entries of a stack of layers begin with."""
        return self.theirs[0].split("{i}")[0]

    def names(self, groups: Mapping[str, str], layers: int) -> list[list[str]]:
        """Theirs of each layer, or of the only one, the parts; `groups` are the placeholders'."""
        return [[n.format(**{**groups, "i": i}) for n in self.theirs] for i in range(layers)]


class Layout(NamedTuple):
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()  # regular expressions: names of theirs without a counterpart

    def of_every_image_tower(self) -> list[str]:
        """Paths in the image tower that do not depend on its sizes."""
        of_image = (e for e in self.entries if e.ours.startswith("params/image/") and not e.stacked)
        return [entry.ours for entry in of_image if "{" not in entry.ours]


# What can be wrong with arrays, in the order in which it is told.
_MISSING, _UNEXPECTED, _MISFIT = "missing", "unexpected", "of another shape or type"
_NOT_FINITE = "with infinite values or NaN"


def load(layout: Layout, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Their state dict as our variables, whatever the sizes.

    Args:
      state_dict: arrays by name, of any floating-point type.

    Returns:
      {"params": …, "batch_stats": …} of float32 numpy arrays; it may lack what a model needs (see
      `check`), but no layer and no part of an array.

    Raises:
      ValueError: names that the layout does not know, layers or parts that are missing between
        others, arrays of another shape or type and values that are no numbers, all of them listed.
    """
    problems = defaultdict(list)
    rows = [(name, entry) for entry in layout.entries for name in entry.theirs]
    arrays: dict[str, np.ndarray] = {}
    found: dict[str, tuple[Entry, dict[str, str]]] = {}  # by our path
    # Of each stack, so that what its last layer lacks is missed too.
    layers: dict[str, int] = defaultdict(int)
    for name, array in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in layout.ignored):
            continue
        entry, groups = _match(rows, name)
        layer = int(groups.get("i", 0))
        if entry is None or layer >= len(state_dict):  # more layers than arrays
            problems[_UNEXPECTED].append(name)
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems[_MISFIT].append(f"{name} has type {array.dtype}, expected floating point")
        else:
            arrays[name] = array
            found[entry.ours.format(**groups)] = entry, groups
            layers[entry.stack] = max(layers[entry.stack], layer + 1)

    flat = {}
    for path, (entry, groups) in found.items():
        names = entry.names(groups, layers[entry.stack])
        every = list(itertools.chain(*names))
        if absent := [name for name in every if name not in arrays]:
            problems[_MISSING] += absent
            continue
        try:
            values = [
                entry.transform.forward(
                    np.concatenate([arrays[n] for n in parts]) if parts[1:] else arrays[parts[0]]
                )
                for parts in names
            ]
            value = np.stack(values) if entry.stacked else values[0]
        except ValueError:  # numpy's, about dimensions
            problems[_MISFIT] += [
                f"{name} has shape {arrays[name].shape}, which does not fit" for name in every
            ]
            continue
        with np.errstate(over="ignore"):  # what float32 does not hold is told
            flat[path] = np.asarray(value, np.float32)
            if not np.isfinite(flat[path]).all():
                problems[_NOT_FINITE] += [
                    n for n in every if not np.isfinite(arrays[n].astype(np.float32)).all()
                ]
    _raise(problems)
    return unflatten_dict(flat, sep="/")


def check(layout: Layout | None, variables: Any, like: Any) -> None:
    """Raises ValueError unless `variables` have the structure and the shapes of `like`.

    Everything that differs is listed, under its name in the layout (None: by our path).
    """
    ours, wanted = _layers(layout, variables), _layers(layout, like)
    misfits = (n for n in wanted.keys() & ours.keys() if ours[n][1] != wanted[n][1])
    problems = {
        _MISSING: [name for name in wanted if name not in ours],
        _UNEXPECTED: [name for name in ours if name not in wanted],
        _MISFIT: [
            f"{n} has shape {_their_shape(*ours[n])}, expected {_their_shape(*wanted[n])}"
            for n in misfits
        ],
    }
    _raise(problems)


def dump(layout: Layout, variables: Any) -> dict[str, np.ndarray]:
    """Our variables, or any part of them (gradients, say), under their names; undoes `load`.

    Raises ValueError: variables that the layout has no name for.
    """
    flat = flatten_dict(variables, sep="/")
    rows = [(entry.ours, entry) for entry in layout.entries]
    if unknown := [path for path in flat if _match(rows, path)[0] is None]:
        raise ValueError(f"the layout has no name for: {', '.join(unknown)}")
    state_dict = {}
    for path, leaf in flat.items():
        leaf = np.asarray(leaf)
        entry, names = _place(layout, path, leaf)
        for parts, value in zip(names, leaf if entry.stacked else [leaf], strict=True):
            whole = entry.transform.inverse(value)
            arrays = np.split(whole, len(parts)) if parts[1:] else [whole]
            state_dict |= {n: np.array(x, order="C") for n, x in zip(parts, arrays, strict=True)}
    return state_dict


def table(layout: Layout, variables: Any = None) -> Iterator[tuple[str, str, str]]:
    """Rows of (our path, their name, how the array changes): the entries, or those of variables."""
    if variables is None:
        for entry in layout.entries:
            yield entry.ours, " + ".join(entry.theirs), entry.transform.name
        return
    for path, leaf in flatten_dict(variables, sep="/").items():
        entry, names = _place(layout, path, leaf)
        for layer, parts in enumerate(names):
            row = f"[{layer}]" if entry.stacked else ""
            yield path + row, " + ".join(parts), entry.transform.name


def raise_missing(layout: Layout, paths: Iterable[str]) -> None:
    """Raises ValueError if there are any such paths, which are not stacked, by their names."""
    _raise({_MISSING: [n for path in paths for n in _place(layout, path, None)[1][0]]})


def _raise(problems: Mapping[str, list[str]]) -> None:
    """Raises ValueError if there are any problems, with all of them."""
    lines = [
        f"\n{what}: {_listed(problems[what])}"
        for what in (_MISSING, _UNEXPECTED, _MISFIT, _NOT_FINITE)
        if problems.get(what)
    ]
    if lines:
        raise ValueError("the arrays do not fit:" + "".join(lines))


def _listed(names: list[str], most: int = 100) -> str:
    # By numbers as numbers: layer 2 comes before layer 10.
    names = sorted(names, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(20), name))
    more = f", … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@functools.cache
def _pattern(name: str) -> re.Pattern:
    # "conv{n}/kernel" -> "conv(?P<n>[0-9]+)/kernel"; re.escape leaves "/" and "_" alone
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(name)))


def _match(rows: Iterable[tuple[str, Entry]], name: str) -> tuple[Entry | None, dict[str, str]]:
    """The first entry whose pattern a name fits, and what its placeholders stand for there."""
    for pattern, entry in rows:
        if match := _pattern(pattern).fullmatch(name):
            return entry, match.groupdict()
    return None, {}


def _place(layout: Layout | None, path: str, leaf: Any) -> tuple[Entry, list[list[str]]]:
    """The entry of a variable of ours, and its names: of each layer the parts."""
    rows = [(entry.ours, entry) for entry in layout.entries] if layout else []
    entry, groups = _match(rows, path)
    entry = entry or Entry(path, (path,), SAME)
    return entry, entry.names(groups, leaf.shape[0] if entry.stacked else 1)


def _layers(layout: Layout | None, variables: Any) -> dict[str, tuple[Entry, tuple[int, ...]]]:
    """Of each name of theirs the entry, and our shape of a layer of it."""
    layers = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        entry, names = _place(layout, path, leaf)
        shape = leaf.shape[1:] if entry.stacked else leaf.shape
        layers |= dict.fromkeys(itertools.chain(*names), (entry, shape))
    return layers


def _their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of each part of a layer, from the shape of ours."""
    try:
        layer = jax.ShapeDtypeStruct(shape, np.float32)
        whole = jax.eval_shape(entry.transform.inverse, layer).shape
    except (ValueError, TypeError):  # so different that the transform does not apply
        return shape
    return (whole[0] // len(entry.theirs), *whole[1:]) if whole else ()
