"""Methods: each a value with a few pure functions. `build` looks one up by its name."""

from declip_jax.methods import alip, clip, declip, defilip, filip, slip
from declip_jax.methods.base import Aux, Method, Views

METHODS = {
    "clip": clip.build,
    "slip": slip.build,
    "filip": filip.build,
    "declip": declip.build,
    "defilip": defilip.build,
    "alip": alip.build,
}


def build(config, mesh) -> Method:
    """Builds the method named by `config.method`, for arrays that lie over `mesh`.

    Raises:
      ValueError: unknown method, or a model or loss setting that it cannot take.
    """
    if config.method not in METHODS:
        raise ValueError(
            f"config.method={config.method!r} is not a method; expected one of {sorted(METHODS)}."
        )
    return METHODS[config.method](config, mesh)


__all__ = ["METHODS", "Aux", "Method", "Views", "build"]
