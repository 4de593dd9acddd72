"""The optimizer: learning-rate schedules, parameter groups by name, AdamW, LAMB and SGD."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from declip_jax.parallel import rules

# How schedules rise from 0 to 1 and fall from there, by their share of the way: 0 … 1.
_SHAPES = {
    "constant": (lambda t: t, lambda t: 1.0),
    "cosine": (lambda t: t, lambda t: (1 + jnp.cos(jnp.pi * t)) / 2),
    "linear": (lambda t: t, lambda t: 1 - t),
    "one_cycle": (lambda t: (1 - jnp.cos(jnp.pi * t)) / 2, lambda t: (1 + jnp.cos(jnp.pi * t)) / 2),
}

# What "one_cycle" adds to Adam's b1 at the ends and takes off at the peak: from 0.9 it makes the
# 0.95 and 0.85 of torch's OneCycleLR.
_SWING = 0.05


def make_schedule(config) -> optax.Schedule:
    """Warm-up from `warmup_lr` to `peak_lr`, then the decay that `config.optim.schedule` names.

    With w warm-up steps of T, the n-th step (from 1) is (n - 1)/(w - 1) of the way up, and after
    the warm-up (n - w)/(T - w) of the way down to `end_lr`. The way up is linear; that of
    "one_cycle" is a cosine, as that of torch's OneCycleLR, whose settings are
    w = pct_start · T, warmup_lr = max_lr / div_factor and end_lr = warmup_lr / final_div_factor.

    Raises:
      ValueError: unknown schedule, or a warm-up longer than the run.
    """
    optim, height = config.optim, _height(config)

    def learning_rate(count):  # count: updates done before this one
        start = jnp.where(count < optim.warmup_steps, optim.warmup_lr, optim.end_lr)
        return start + (optim.peak_lr - start) * height(count)

    return learning_rate


def _height(config) -> Callable:
    """Returns height(count), 0 at the ends of the schedule and 1 at its peak."""
    schedule, warmup, total = config.optim.schedule, config.optim.warmup_steps, config.total_steps
    if schedule not in _SHAPES:
        raise ValueError(f"config.optim.schedule={schedule!r} is not one of {sorted(_SHAPES)}.")
    if not 0 <= warmup <= total:
        raise ValueError(
            f"config.optim.warmup_steps={warmup} must lie between 0 and config.total_steps={total}."
        )
    rise, fall = _SHAPES[schedule]

    def height(count):
        n = count + 1
        up = (n - 1) / max(warmup - 1, 1)
        down = jnp.minimum((n - warmup) / max(total - warmup, 1), 1.0)
        return jnp.where(n <= warmup, rise(up), fall(down))

    return height


def _check_patterns(patterns: Iterable[str], params: Any, what: str) -> None:
    """Raises ValueError for a pattern that is found in no parameter's name."""
    names = [rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(map(rules.compile_pattern(pattern, what).search, names)):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            raise ValueError(f"{what}: {pattern!r} finds no parameter; did you mean {close[0]!r}?")


def frozen_mask(config, params: Any) -> Any:
    """True for parameters found by a pattern of `config.optim.frozen`: no gradient, no update.

    Raises:
      ValueError: a pattern that finds no parameter.
    """
    _check_patterns(config.optim.frozen, params, "config.optim.frozen")
    frozen = [(pattern, True) for pattern in config.optim.frozen]
    return rules.match(params, [*frozen, ("", False)], "config.optim.frozen")


def _lr_factors(config, params: Any) -> Any:
    """What multiplies each parameter's learning rate, by `config.optim.lr_rules`."""
    what, lr_rules = "config.optim.lr_rules", config.optim.lr_rules
    for pattern, factor in lr_rules:
        if factor < 0:
            raise ValueError(f"{what}: the factor {factor} of {pattern!r} must be at least 0.")
    _check_patterns([pattern for pattern, _ in lr_rules], params, what)
    return rules.match(params, lr_rules, what)


def _adam(config) -> optax.GradientTransformation:
    """Adam's direction, whose b1 moves against the learning rate with "one_cycle"."""
    optim = config.optim
    if optim.schedule != "one_cycle":
        return optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    if not _SWING <= optim.b1 < 1 - _SWING:
        raise ValueError(
            f"config.optim.b1={optim.b1} must lie in {_SWING} … {1 - _SWING} with "
            f"config.optim.schedule='one_cycle', which moves it by {_SWING} either way."
        )
    height = _height(config)

    def update(updates, state, params=None):
        b1 = optim.b1 + _SWING * (1 - 2 * height(state.count))
        return optax.scale_by_adam(b1, optim.b2, optim.eps).update(updates, state, params)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _scale_by_trust_ratio() -> optax.GradientTransformation:
    """Multiplies each layer's update by ‖parameter‖ / ‖update‖, unless one of them is 0.

    optax's would take the blocks of a transformer, which are stacked on axis 0, for one layer.
    """

    def scale(path, update, param):
        stacked = "/blocks/" in rules.path_name(path)
        axes = tuple(range(1 if stacked else 0, update.ndim))
        size = jnp.sqrt(jnp.sum(jnp.square(param), axes, keepdims=True))
        step = jnp.sqrt(jnp.sum(jnp.square(update), axes, keepdims=True))
        return update * jnp.where((size > 0) & (step > 0), size / step, 1.0)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params)
    )


def make_optimizer(config, params: Any) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax chain of a run.

    "adamw" is Loshchilov and Hutter's (https://arxiv.org/abs/1711.05101). "lamb" is You et al.'s
    (https://arxiv.org/abs/1904.00962): the same direction times each layer's trust ratio, which
    parameters without decay are spared, as in the authors' and NVIDIA's programs. "sgd" has
    Nesterov momentum and adds the decay to the gradient, as torch.optim.SGD does.

    Args:
      config: the run's configuration; reads `optim` and `total_steps`.
      params: the parameters, or their ShapeDtypeStructs.

    Returns:
      The transformation and its learning-rate schedule.

    Raises:
      ValueError: a setting that is unknown or out of range. The transformation's `init` raises it
        for a parameter that no rule of `config.optim.decay_rules` covers.
    """
    optim = config.optim
    for name in ("peak_lr", "warmup_lr", "end_lr", "eps", "weight_decay", "clip_norm"):
        if optim[name] < 0:
            raise ValueError(f"config.optim.{name}={optim[name]} must be at least 0.")
    for name in ("b1", "b2", "momentum"):
        if not 0 <= optim[name] < 1:
            raise ValueError(f"config.optim.{name}={optim[name]} must lie in 0 … 1, below 1.")
    schedule = make_schedule(config)

    def decays(tree):
        return rules.match(tree, optim.decay_rules, "config.optim.decay_rules")

    decay = optax.add_decayed_weights(optim.weight_decay, decays)
    directions = {
        "adamw": lambda: (_adam(config), decay),
        "lamb": lambda: (_adam(config), decay, optax.masked(_scale_by_trust_ratio(), decays)),
        "sgd": lambda: (decay, optax.trace(optim.momentum, nesterov=True)),
    }
    if optim.name not in directions:
        raise ValueError(f"config.optim.name={optim.name!r} is not one of {sorted(directions)}.")
    update = optax.chain(*directions[optim.name](), optax.scale_by_learning_rate(schedule))

    factors = _lr_factors(config, params)
    groups = {True: optax.set_to_zero(), False: update}
    return (
        optax.chain(
            optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
            optax.partition(groups, frozen_mask(config, params)),
            optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)),
        ),
        schedule,
    )
