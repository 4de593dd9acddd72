"""Sections of the configuration: what is read, and how what is wrong is told."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from declip_jax.section import Section, at_least, between, one_of, option


class Inner(Section):
    size: int = at_least(1)


class Example(Section):
    name: str = one_of("adamw", "sgd")
    share: float = between(0, 1, edges="()")
    sizes: tuple[int, ...] = at_least(1)
    range: tuple[float, float]
    flag: bool
    columns: str | tuple[str, ...]
    rules: tuple[tuple[str, float], ...] = option(expected="pairs (pattern, factor)")
    weights: dict[str, float]
    bias: float | None
    inner: Inner
    pooling: str = one_of("mean", "max", value="mean")


GOOD = dict(
    name="sgd",
    share=0.5,
    sizes=[1, 2],
    range=(0, 1),
    flag=True,
    columns="caption",
    rules=[["kernel$", 1]],
    weights={"clip": 1},
    bias=None,
    inner={"size": 2},
)


def test_reads_mappings_of_any_kind_and_what_it_made_itself():
    read = Example.read(GOOD, "config.example")
    assert read.sizes == (1, 2) and read.rules == (("kernel$", 1.0),) and read.inner.size == 2
    assert read.range == (0.0, 1.0) and isinstance(read.range[0], float)
    assert read.pooling == "mean"  # it alone has a value of its own
    assert Example.read(ConfigDict(GOOD), "config.example") == read
    assert Example.read(read.as_dict(), "config.example") == read
    assert Example.read(read, "config.example") is read
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.share = 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "adamv"}, "name='adamv' is not one of ['adamw', 'sgd']. Did you mean 'adamw'?"),
        ({"name": 3}, "name=3: expected a text."),
        ({"share": 0}, "share=0.0 must lie in 0 … 1, above 0, below 1."),
        ({"share": 1}, "share=1.0 must lie in 0 … 1, above 0, below 1."),
        ({"share": True}, "share=True: expected a number."),
        ({"share": float("nan")}, "share=nan is not a number."),
        ({"sizes": [0]}, "sizes=(0,) must be at least 1."),
        ({"sizes": 3}, "sizes=3: expected a tuple, each of it a whole number."),
        ({"sizes": [2**63]}, "sizes=(9223372036854775808,) must be at most 2147483647."),
        ({"range": (1,)}, "range=(1,): expected (a number, a number)."),
        ({"flag": 1}, "flag=1: expected True or False."),
        ({"columns": 3}, "columns=3: expected a text or a tuple, each of it a text."),
        ({"rules": ("ab", 1.0)}, "rules=('ab', 1.0): expected pairs (pattern, factor)."),
        ({"rules": ("ab", "cd")}, "rules=('ab', 'cd'): expected pairs (pattern, factor)."),
        ({"weights": {"clip": "x"}}, "weights.clip='x': expected a number."),
        ({"weights": 1.0}, "weights=1.0: expected a section."),
        ({"bias": "x"}, "bias='x': expected a number or None."),
        ({"inner": {"size": 0}}, "inner.size=0 must be at least 1."),
        ({"inner": {"siz": 1}}, "inner has no field 'siz'. Did you mean 'size'?"),
        ({"inner": {}}, "inner lacks the field 'size'."),
        ({"inner": 5}, "inner=5 must be a section with the fields of one."),
        ({"pooling": "men"}, "pooling='men' is not one of ['mean', 'max']. Did you mean 'mean'?"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        Example.read(GOOD | changes, "config.example")
    assert str(error.value).startswith(f"config.example.{message}")
