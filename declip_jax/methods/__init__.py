"""Methods: each a `Definition`. `build` assembles the one that has a name."""

from declip_jax.hints import did_you_mean
from declip_jax.methods import alip, base, clip, declip, defilip, filip, slip
from declip_jax.methods.base import Aux, Definition, Method, Views

METHODS = {
    "clip": clip.METHOD,
    "slip": slip.METHOD,
    "filip": filip.METHOD,
    "declip": declip.METHOD,
    "defilip": defilip.METHOD,
    "alip": alip.METHOD,
}


def build(name: str, *sections, **sizes) -> Method:
    """Builds the method named by `config.method`; see `base.build` for the arguments.

    Raises ValueError: unknown method, or a model or loss setting that it cannot take.
    """
    if name not in METHODS:
        raise ValueError(
            f"config.method={name!r} is not one of {sorted(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    return base.build(METHODS[name], *sections, **sizes)


__all__ = ["METHODS", "Aux", "Definition", "Method", "Views", "build"]
