"""Rules over parameter names: one matcher for sharding, weight decay and freezing."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# (pattern, layout): the first pattern found in a leaf's path decides. "fsdp" divides the longest
# dimension that the axis divides evenly; leaves with none are replicated. "rows" divides the first
# dimension over all devices.
SHARDING_RULES = (
    (r"(^|/)(step|rng|count|logit_scale(_dense)?)$", "replicated"),
    (r"/support_set/rows$", "rows"),
    (r"(^|/)model_state/", "replicated"),
    (r"(bias|scale)$", "replicated"),
    (r"(kernel|embedding)$", "fsdp"),
)


def path_name(path) -> str:
    """A pytree key path as "image/blocks/ln_1/scale"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def compile_pattern(pattern: str, what: str) -> re.Pattern:
    """A regular expression. Raises ValueError, naming `what` it stands in, if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}: {pattern!r} is no regular expression ({error}).") from error


def match(tree: Any, rules: Sequence[tuple[str, Any]], what: str) -> Any:
    """Gives every leaf of a pytree the value of the first rule whose pattern is found in its path.

    Rules are pairs (regular expression, value); `what` is their name, for the error.

    Raises:
      ValueError: leaves that no rule covers, by name, or a pattern that is no regular expression.
    """
    compiled = [(compile_pattern(pattern, what), value) for pattern, value in rules]
    uncovered = []

    def value_of(path, _):
        name = path_name(path)
        for pattern, value in compiled:
            if pattern.search(name):
                return value
        uncovered.append(name)

    values = jax.tree_util.tree_map_with_path(value_of, tree)
    if uncovered:
        raise ValueError(
            f"No pattern of {what} covers: {', '.join(uncovered)}. "
            f"Add one for each; the patterns are {[pattern for pattern, _ in rules]}."
        )
    return values


def shardings(tree: Any, mesh: Mesh, rules=SHARDING_RULES) -> Any:
    """NamedShardings for a pytree of arrays or ShapeDtypeStructs, by `rules`."""

    def place(layout, leaf):
        if layout == "rows":
            return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        spec = [None] * len(leaf.shape)
        size = mesh.shape["fsdp"]
        if layout == "fsdp" and size > 1:
            dims = [d for d in range(len(spec)) if leaf.shape[d] % size == 0]
            if dims:
                spec[max(dims, key=lambda d: leaf.shape[d])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(
        place, match(tree, rules, "SHARDING_RULES in declip_jax/parallel/rules.py"), tree
    )
