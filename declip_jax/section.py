"""Sections of the configuration: small frozen dataclasses, checked once, when they are read.

A section stands at the head of the module that heeds it. Its fields have types and rules, no
values: those stand in configs/common.py. (Options do have values, where a configuration need not
name them: those of towers, of columns, of a mixture.)

    class Mesh(Section):
        data: int = at_least(-1)
        fsdp: int = at_least(-1)

    Mesh.read(config.mesh, "config.mesh")
"""

import contextlib
import contextvars
import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

from declip_jax.hints import did_you_mean

LARGEST = 2**31 - 1  # of whole numbers, which become int32 on devices
NoneType = type(None)
_SCALARS = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str, NoneType: NoneType}
_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
_NAMES[NoneType] = "None"


_RULES = contextvars.ContextVar("rules", default=True)


@contextlib.contextmanager
def types_alone():
    """While open, sections are read without rules: a run that once was trained needs no leave."""
    token = _RULES.set(False)
    try:
        yield
    finally:
        _RULES.reset(token)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Section:
    """A part of the configuration. Subclasses are frozen dataclasses by themselves."""

    def __init_subclass__(cls):
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def read(cls, values: Any, where: str) -> Self:
        """The section that a mapping, such as a ConfigDict, describes.

        Args:
          values: has a value for each field, lists in place of tuples at will, and nothing else.
          where: the section's name in messages, as "config.optim".

        Raises ValueError: naming the field, its value, and what was expected.
        """
        if isinstance(values, cls):
            return values
        if not _is_mapping(values):
            raise ValueError(f"{where}={values!r} must be a section with the fields of one.")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                hint = did_you_mean(name, fields)
                raise ValueError(f"{where} has no field {name!r}.{hint} It has {sorted(fields)}.")
        hints, read = typing.get_type_hints(cls), {}
        for name, field in fields.items():
            if name in values:
                read[name] = _read_field(values[name], hints[name], field, f"{where}.{name}")
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"{where} lacks the field {name!r}.")
        section = cls(**read)
        if _RULES.get():
            section.check(where)
        return section

    def check(self, where: str) -> None:
        """Raises ValueError for fields that do not go together. For subclasses."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def option(value: Any = dataclasses.MISSING, *, rule=None, read=None, expected: str = "") -> Any:
    """A field of a section.

    Args:
      value: where a configuration does not name the field; otherwise it must.
      rule: value -> what must hold of it, as "must be at least 1", or "" if it does.
      read: (value, where) -> the section that is the field's value, in place of its type's `read`.
      expected: of a value of another type: what was expected, where the type does not say enough.
    """
    metadata = dict(rule=rule, read=read, expected=expected)
    return dataclasses.field(default=value, metadata=metadata)


def at_least(low: float, value: Any = dataclasses.MISSING) -> Any:
    """A number, or a tuple of numbers, from `low` on."""

    def rule(given) -> str:
        several = given if isinstance(given, tuple) else (given,)
        high = max(several, default=low)
        if high > LARGEST and isinstance(high, int) or high == math.inf:
            return f"must be at most {LARGEST}"
        return "" if low <= min(several, default=low) else f"must be at least {low}"

    return option(value, rule=rule)


def between(low: float, high: float, value: Any = dataclasses.MISSING, *, edges: str = "[]") -> Any:
    """A number from `low` to `high`; a round bracket leaves an edge out, as in "(0, 1]"."""
    above, below = edges[0] == "(", edges[1] == ")"
    told = f"must lie in {low} … {high}" if high < math.inf else f"must be at least {low}"
    told += (f", above {low}" if above else "") + (f", below {high}" if below else "")

    def rule(given) -> str:
        inside = low <= given <= high and not (above and given == low or below and given == high)
        return "" if inside else told

    return option(value, rule=rule)


def one_of(*known: str, value: Any = dataclasses.MISSING) -> Any:
    """One of several words."""

    def rule(given) -> str:
        hint = did_you_mean(given, known)
        return "" if given in known else f"is not one of {list(known)}.{hint}"

    return option(value, rule=rule)


def read_value(value: Any, hint: Any, where: str, expected: str = "") -> Any:
    """`value` as the type `hint`. Raises ValueError if it is of another."""
    wrong = ValueError(f"{where}={value!r}: expected {expected or _describe(hint)}.")
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for one in inner:
            try:
                return read_value(value, one, where)
            except ValueError:
                continue
        raise wrong
    if hint in _SCALARS:
        if not isinstance(value, _SCALARS[hint]) or (isinstance(value, bool) and hint is not bool):
            raise wrong
        if value != value:
            raise ValueError(f"{where}={value!r} is not a number.")
        return value if value is None else hint(value)
    if origin is dict:
        if not _is_mapping(value):
            raise wrong
        return {name: read_value(value[name], inner[1], f"{where}.{name}") for name in value}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        each = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(each) != len(value):
            raise wrong
        try:
            return tuple(read_value(v, h, where) for v, h in zip(value, each, strict=True))
        except ValueError:
            raise wrong from None
    return hint.read(value, where)


def _read_field(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    metadata = field.metadata or {"rule": None, "read": None, "expected": ""}
    if metadata["read"]:
        return metadata["read"](value, where)
    value = read_value(value, hint, where, metadata["expected"])
    if broken := _RULES.get() and metadata["rule"] and metadata["rule"](value):
        raise ValueError(f"{where}={value!r} {broken}" + ("" if broken[-1] in ".?" else "."))
    return value


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "items")  # a ConfigDict is no Mapping


def _describe(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if origin is tuple and inner[1:] == (...,):
        return f"a tuple, each of it {_describe(inner[0])}"
    if origin is tuple:
        return f"({', '.join(map(_describe, inner))})"
    if origin is dict:
        return "a section"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, inner))
    return f"the fields of {hint.__name__}"
