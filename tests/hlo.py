"""What a compiled program sends between devices."""

import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def largest_collective(compiled) -> int:
    """Elements of the largest array that goes into or comes out of a collective."""
    shapes, collectives = {}, []
    for name, result, op, operands in re.findall(
        r"^ *(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z-]+)\(([^)]*)\)", compiled.as_text(), re.M
    ):
        shapes[name] = [
            np.prod([int(n) for n in dims.split(",") if n], dtype=int)
            for dims in re.findall(r"\w\[([\d,]*)\]", result)
        ]
        if op.removesuffix("-start") in COLLECTIVES:
            collectives += [name, *re.findall(r"%([\w.-]+)", operands)]
    assert collectives
    return max(size for name in collectives for size in shapes[name])
