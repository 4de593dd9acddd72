"""The optimizer: learning-rate schedules, parameter groups by name, AdamW, LAMB and SGD."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from declip_jax.hints import did_you_mean
from declip_jax.parallel import rules
from declip_jax.section import Section, at_least, between, one_of, option

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


class Optim(Section):
    """The section `config.optim`; configs/common.py tells of each field."""

    name: str = one_of("adamw", "lamb", "sgd")
    peak_lr: float = at_least(0)
    warmup_lr: float = at_least(0)
    warmup_steps: int = at_least(0)
    schedule: str = one_of(*_SHAPES)
    end_lr: float = at_least(0)
    b1: float = between(0, 1, edges="[)")
    b2: float = between(0, 1, edges="[)")
    eps: float = at_least(0)
    momentum: float = between(0, 1, edges="[)")
    weight_decay: float = at_least(0)
    decay_rules: tuple[tuple[str, bool], ...] = option(
        expected="pairs (pattern, True or False); a single one has a comma after it, as "
        "(('kernel$', True),)"
    )
    lr_rules: tuple[tuple[str, float], ...] = option(
        rule=lambda rules: "has a factor below 0" if any(f < 0 for _, f in rules) else "",
        expected="pairs (pattern, factor); a single one has a comma after it, as (('', 1.0),)",
    )
    frozen: tuple[str, ...]
    clip_norm: float = at_least(0)

    def check(self, where: str) -> None:
        if self.schedule == "one_cycle" and not _SWING <= self.b1 < 1 - _SWING:
            raise ValueError(
                f"{where}.b1={self.b1} must lie in {_SWING} … {1 - _SWING} with "
                f"{where}.schedule='one_cycle', which moves it by {_SWING} either way."
            )


def make_schedule(optim: Optim, total_steps: int) -> optax.Schedule:
    """Warm-up from `warmup_lr` to `peak_lr`, then the decay that `schedule` names.

    With w warm-up steps of T, the n-th step (from 1) is (n - 1)/(w - 1) of the way up, and after
    the warm-up (n - w)/(T - w) of the way down to `end_lr`. The way up is linear; that of
    "one_cycle" is a cosine, as that of torch's OneCycleLR, whose settings are
    w = pct_start · T, warmup_lr = max_lr / div_factor and end_lr = warmup_lr / final_div_factor.
    """
    height = _height(optim, total_steps)

    def learning_rate(count):  # count: updates done before this one
        start = jnp.where(count < optim.warmup_steps, optim.warmup_lr, optim.end_lr)
        return start + (optim.peak_lr - start) * height(count)

    return learning_rate


def _height(optim: Optim, total_steps: int) -> Callable:
    """Returns height(count), 0 at the ends of the schedule and 1 at its peak."""
    warmup, (rise, fall) = optim.warmup_steps, _SHAPES[optim.schedule]

    def height(count):
        n = count + 1
        up = (n - 1) / max(warmup - 1, 1)
        down = jnp.minimum((n - warmup) / max(total_steps - warmup, 1), 1.0)
        return jnp.where(n <= warmup, rise(up), fall(down))

    return height


def _check_patterns(patterns: Iterable[str], params: Any, what: str) -> None:
    """Raises ValueError for a pattern that is found in no parameter's name."""
    names = [rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(map(rules.compile_pattern(pattern, what).search, names)):
            hint = did_you_mean(pattern, names, cutoff=0)
            raise ValueError(f"{what}: {pattern!r} finds no parameter.{hint}")


def frozen_mask(patterns: Sequence[str], params: Any) -> Any:
    """True for parameters found by a pattern of `frozen`: no gradient, no update.

    Raises ValueError: a pattern that finds no parameter.
    """
    _check_patterns(patterns, params, "config.optim.frozen")
    frozen = [(pattern, True) for pattern in patterns]
    return rules.match(params, [*frozen, ("", False)], "config.optim.frozen")


def _lr_factors(lr_rules: Sequence[tuple[str, float]], params: Any) -> Any:
    """What multiplies each parameter's learning rate."""
    _check_patterns([pattern for pattern, _ in lr_rules], params, "config.optim.lr_rules")
    return rules.match(params, lr_rules, "config.optim.lr_rules")


def _adam(optim: Optim, total_steps: int) -> optax.GradientTransformation:
    """Adam's direction, whose b1 moves against the learning rate with "one_cycle"."""
    if optim.schedule != "one_cycle":
        return optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    height = _height(optim, total_steps)

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


def make_optimizer(
    optim: Optim, total_steps: int, params: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax chain of a run.

    "adamw" is Loshchilov and Hutter's (https://arxiv.org/abs/1711.05101). "lamb" is You et al.'s
    (https://arxiv.org/abs/1904.00962): the same direction times each layer's trust ratio, which
    parameters without decay are spared, as in the authors' and NVIDIA's programs. "sgd" has
    Nesterov momentum and adds the decay to the gradient, as torch.optim.SGD does.

    Returns the transformation and its schedule; `params` may be ShapeDtypeStructs.

    Raises:
      ValueError: a pattern that finds no parameter. The transformation's `init` raises it for a
        parameter that no rule of `decay_rules` covers.
    """
    schedule = make_schedule(optim, total_steps)

    def decays(tree):
        return rules.match(tree, optim.decay_rules, "config.optim.decay_rules")

    decay = optax.add_decayed_weights(optim.weight_decay, decays)
    directions = {
        "adamw": lambda: (_adam(optim, total_steps), decay),
        "lamb": lambda: (
            _adam(optim, total_steps),
            decay,
            optax.masked(_scale_by_trust_ratio(), decays),
        ),
        "sgd": lambda: (decay, optax.trace(optim.momentum, nesterov=True)),
    }
    update = optax.chain(*directions[optim.name](), optax.scale_by_learning_rate(schedule))

    factors = _lr_factors(optim.lr_rules, params)
    groups = {True: optax.set_to_zero(), False: update}
    return (
        optax.chain(
            optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
            optax.partition(groups, frozen_mask(optim.frozen, params)),
            optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)),
        ),
        schedule,
    )
