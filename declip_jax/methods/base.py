"""What a method is. The training step knows nothing else about it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from declip_jax.losses.contrastive import normalise
from declip_jax.models.two_towers import TwoTowers

PyTree = Any


class Views(NamedTuple):
    """What the pipeline must deliver for each pair: names of `config.views` and of text views."""

    image: tuple[str, ...]
    text: tuple[str, ...]


class Aux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      metrics: scalars to log: "loss" and "top1", which the progress line shows, every term of the
        loss under its name, and whatever else tells how the method does.
      extra: the new value of the state that is not parameters.
    """

    metrics: dict[str, jax.Array]
    extra: PyTree


class Method(NamedTuple):
    """A training method as pure functions.

    B is the global batch, V image views, T text views, L tokens, D the embedding width.
    `params` are what the optimiser updates. `extra` is all other state: BN statistics, a support
    set, running means; it is checkpointed and sharded like the parameters.
    """

    views: Views
    # init(rng) -> (params, extra)
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    # loss(params, extra, batch, rng) -> (scalar, Aux); batch["image"] float [B, V, H, W, 3],
    # batch["tokens"] int32 [B, T, L]
    loss: Callable[[PyTree, PyTree, dict[str, jax.Array], jax.Array], tuple[jax.Array, Aux]]
    # project(params) -> params: the constraint that holds after every update
    project: Callable[[PyTree], PyTree]
    # encode_image(params, extra, images [B, H, W, 3]) -> [B, D] unit rows, evaluation mode
    encode_image: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    # encode_text(params, extra, tokens [B, L]) -> [B, D] unit rows
    encode_text: Callable[[PyTree, PyTree, jax.Array], jax.Array]


def check_weights(weights: Mapping[str, float], terms: tuple[str, ...]) -> dict[str, float]:
    """Returns `weights` as a dict if it has exactly one weight for each of the method's `terms`.

    Raises:
      ValueError: a term without a weight, or a weight without a term.
    """
    if set(weights) != set(terms):
        raise ValueError(
            f"config.loss.weights has {sorted(weights)}, but the method's loss terms are "
            f"{sorted(terms)}: name each term exactly once (a weight of 0 switches one off)."
        )
    return dict(weights)


def weighted_sum(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Sum of weight · term over the names, which `check_weights` has matched."""
    return sum(weights[name] * term for name, term in terms.items())


def logit_scale_limits(limits) -> tuple[float, float]:
    """Returns `config.loss.logit_scale_range` as (low, high); raises ValueError if it is not."""
    if len(limits) != 2 or not limits[0] <= limits[1]:
        raise ValueError(
            f"config.loss.logit_scale_range={tuple(limits)} must be (low, high), low <= high."
        )
    return tuple(limits)


def clamp_logit_scale(params: PyTree, limits: tuple[float, float]) -> PyTree:
    """Keeps params["logit_scale"] within `limits` (of the parameter, a logarithm)."""
    return {**params, "logit_scale": jnp.clip(params["logit_scale"], *limits)}


def two_tower_functions(towers: TwoTowers, model) -> dict[str, Callable]:
    """The `init`, `encode_image` and `encode_text` of a method that has nothing but two towers."""

    def init(rng):
        size = model.image.resolution
        variables = towers.init(
            rng,
            jnp.zeros((1, size, size, 3)),
            jnp.full((1, model.text.context), model.text.eot_id, jnp.int32),
        )
        return variables.pop("params"), variables

    def encode_image(params, extra, images):
        variables = {"params": params, **extra}
        return normalise(towers.apply(variables, images, method=TwoTowers.encode_image))

    def encode_text(params, extra, tokens):
        variables = {"params": params, **extra}
        return normalise(towers.apply(variables, tokens, method=TwoTowers.encode_text))

    return {"init": init, "encode_image": encode_image, "encode_text": encode_text}
