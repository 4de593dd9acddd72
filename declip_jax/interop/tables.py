"""Name tables between our variables and a PyTorch state dict, used in both directions.

A layout is a list of entries. An entry pairs a path of ours with a name of theirs and says how the
array changes on the way. Both may hold placeholders, which stand for a whole number each:

    Entry("params/image/conv{n}/kernel", "visual.conv{n}.weight", CONV)
    Entry("params/text/blocks/ln_1/scale", "transformer.resblocks.{i}.ln_1.weight", SAME)

`{i}` in theirs alone is the layer: ours is stacked over layers on axis 0, theirs is one array a
layer. Where theirs is several names, one array of ours is theirs one below the other (axis 0).
"""

import functools
import re
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
    theirs: str | tuple[str, ...]
    transform: Transform

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def stacked(self) -> bool:
        """Ours holds all layers."""
        return "{i}" in self.parts[0] and "{i}" not in self.ours

    @property
    def stack(self) -> str:
        """What the names of all entries of a stack of layers begin with."""
        return self.parts[0].split("{i}")[0]


class Layout(NamedTuple):
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()  # regular expressions: names of theirs without a counterpart

    def of_every_image_tower(self) -> list[str]:
        """Paths in the image tower that do not depend on its sizes."""
        of_image = (e for e in self.entries if e.ours.startswith("params/image/") and not e.stacked)
        return [entry.ours for entry in of_image if "{" not in entry.ours]


class _Place(NamedTuple):
    """Where a variable of ours lies in their state dict."""

    entry: Entry
    names: list[list[str]]  # of each layer, or of the only one, the parts


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
    problems = {
        name: []
        for name in (
            "missing",
            "unexpected",
            "of another shape or type",
            "with infinite values or NaN",
        )
    }
    found: dict[str, dict[tuple[int, int], np.ndarray]] = {}  # by path; (layer, part)
    entries: dict[str, tuple[Entry, dict[str, str]]] = {}
    patterns = [
        (entry, part, _pattern(name))
        for entry in layout.entries
        for part, name in enumerate(entry.parts)
    ]
    for name, array in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in layout.ignored):
            continue
        matches = ((entry, part, pattern.fullmatch(name)) for entry, part, pattern in patterns)
        entry, part, match = next((m for m in matches if m[2]), (None, 0, None))
        if entry is None:
            problems["unexpected"].append(name)
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            line = f"{name} has type {array.dtype}, expected floating point"
            problems["of another shape or type"].append(line)
            continue
        groups = match.groupdict()
        path = entry.ours.format(**groups)
        if entry.stacked and int(groups["i"]) >= len(state_dict):  # more layers than arrays
            problems["unexpected"].append(name)
            continue
        entries[path] = entry, groups
        found.setdefault(path, {})[int(groups["i"]) if entry.stacked else 0, part] = array

    # Of each stack, so that what its last layer lacks is missed too.
    layers_of: dict[str, int] = {}
    for path, arrays in found.items():
        stack = entries[path][0].stack
        layers_of[stack] = max(layers_of.get(stack, 0), *(layer + 1 for layer, _ in arrays))

    flat = {}
    for path, arrays in found.items():
        entry, groups = entries[path]
        layers = layers_of[entry.stack] if entry.stacked else 1

        def name_of(layer, part, entry=entry, groups=groups):
            return entry.parts[part].format(**groups | {"i": layer})

        wanted = [(layer, part) for layer in range(layers) for part in range(len(entry.parts))]
        if absent := [name_of(*place) for place in wanted if place not in arrays]:
            problems["missing"] += absent
            continue
        try:
            rows = []
            for layer in range(layers):
                theirs = [arrays[layer, part] for part in range(len(entry.parts))]
                whole = theirs[0] if len(theirs) == 1 else np.concatenate(theirs)
                rows.append(entry.transform.forward(whole))
            value = np.stack(rows) if entry.stacked else rows[0]
        except ValueError:  # numpy's, about dimensions
            problems["of another shape or type"] += [
                f"{name_of(*place)} has shape {array.shape}, which does not fit"
                for place, array in sorted(arrays.items())
            ]
            continue
        with np.errstate(over="ignore"):  # what float32 does not hold is told
            flat[tuple(path.split("/"))] = value = np.asarray(value, np.float32)
            if not np.isfinite(value).all():
                problems["with infinite values or NaN"] += [
                    name_of(*place)
                    for place, array in sorted(arrays.items())
                    if not np.isfinite(array.astype(np.float32)).all()
                ]
    raise_problems(problems)
    return unflatten_dict(flat)


def check(layout: Layout | None, variables: Any, like: Any) -> None:
    """Raises ValueError unless `variables` have the structure and the shapes of `like`.

    Everything that differs is listed, under its name in the layout (None: by our path).
    """
    ours, wanted = flatten_dict(variables, sep="/"), flatten_dict(like, sep="/")
    problems = {"missing": [], "unexpected": [], "of another shape or type": []}
    for path, leaf in wanted.items():
        place = _place(layout, path, leaf)
        has = np.shape(ours[path]) if path in ours else ()
        if path not in ours:
            problems["missing"] += sum(place.names, [])
        elif place.entry.stacked and has[0] != leaf.shape[0]:
            both = _place(layout, path, ours[path]).names
            problems["missing"] += sum(place.names[has[0] :], [])
            problems["unexpected"] += sum(both[leaf.shape[0] :], [])
        elif has != leaf.shape:
            theirs, expected = (_their_shape(place, shape) for shape in (has, leaf.shape))
            problems["of another shape or type"] += [
                f"{name} has shape {theirs}, expected {expected}" for name in sum(place.names, [])
            ]
    for path in ours.keys() - wanted.keys():
        problems["unexpected"] += sum(_place(layout, path, ours[path]).names, [])
    raise_problems(problems)


def dump(layout: Layout, variables: Any) -> dict[str, np.ndarray]:
    """Our variables, or any part of them (gradients, say), under their names; undoes `load`.

    Raises:
      ValueError: variables that the layout has no name for.
    """
    flat = flatten_dict(variables, sep="/")
    if unknown := [path for path in flat if _find(layout, path) is None]:
        raise ValueError(f"the layout has no name for: {', '.join(unknown)}")
    state_dict = {}
    for path, leaf in flat.items():
        leaf = np.asarray(leaf)
        place = _place(layout, path, leaf)
        for names, value in zip(place.names, leaf if place.entry.stacked else [leaf], strict=True):
            whole = place.entry.transform.inverse(value)
            parts = np.split(whole, len(names)) if len(names) > 1 else [whole]
            for name, part in zip(names, parts, strict=True):
                state_dict[name] = np.array(part, order="C")
    return state_dict


def names_of(layout: Layout, paths: Iterable[str]) -> list[str]:
    """Their names of variables of ours that are not stacked."""
    return [name for path in paths for name in sum(_place(layout, path, np.zeros(())).names, [])]


def table(layout: Layout, variables: Any = None) -> Iterator[tuple[str, str, str]]:
    """Rows of (our path, their name, how the array changes): the entries, or those of variables."""
    if variables is None:
        for entry in layout.entries:
            yield entry.ours, " + ".join(entry.parts), entry.transform.name
        return
    for path, leaf in flatten_dict(variables, sep="/").items():
        place = _place(layout, path, leaf)
        for layer, names in enumerate(place.names):
            row = f"[{layer}]" if place.entry.stacked else ""
            yield path + row, " + ".join(names), place.entry.transform.name


def raise_problems(problems: Mapping[str, list[str]]) -> None:
    """Raises ValueError if there are any, with all of them."""
    if any(problems.values()):
        raise ValueError(
            "the arrays do not fit:"
            + "".join(f"\n{what}: {_listed(names)}" for what, names in problems.items() if names)
        )


def _listed(names: list[str], most: int = 100) -> str:
    names = sorted(names, key=lambda name: [int(s) if s.isdigit() else s for s in _split(name)])
    more = f", … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _split(name: str) -> list[str]:
    return re.split(r"(\d+)", name)  # words and numbers in turn: layer 2 comes before layer 10


@functools.cache
def _pattern(name: str) -> re.Pattern:
    # "conv{n}/kernel" -> "conv(?P<n>[0-9]+)/kernel"; re.escape leaves "/" and "_" alone
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(name)))


def _find(layout: Layout, path: str) -> tuple[Entry, dict[str, str]] | None:
    for entry in layout.entries:
        if match := _pattern(entry.ours).fullmatch(path):
            return entry, match.groupdict()
    return None


def _place(layout: Layout | None, path: str, leaf: Any) -> _Place:
    entry, groups = (layout and _find(layout, path)) or (Entry(path, path, SAME), {})
    layers = leaf.shape[0] if entry.stacked else 1
    names = [[p.format(**groups | {"i": i}) for p in entry.parts] for i in range(layers)]
    return _Place(entry, names)


def _their_shape(place: _Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of each part of a layer, from the shape of ours."""
    ours = jax.ShapeDtypeStruct(shape[1:] if place.entry.stacked else shape, np.float32)
    try:
        whole = jax.eval_shape(place.entry.transform.inverse, ours).shape
    except (ValueError, TypeError):  # so different that the transform does not apply
        return ours.shape
    return (whole[0] // len(place.entry.parts), *whole[1:]) if whole else ()
