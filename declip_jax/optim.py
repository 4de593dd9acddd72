"""The optimiser: learning-rate schedules, parameter groups by regular expression, AdamW."""

import difflib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from declip_jax.parallel import rules


def make_schedule(config) -> optax.Schedule:
    """Linear warm-up, then the decay that `config.optim.schedule` names.

    The n-th step (from 1) of the warm-up has start + (peak - start)/(warmup - 1)·(n - 1), and the
    decay runs over the remaining steps, ending at `end_lr` after `config.total_steps`.

    Raises:
      ValueError: unknown schedule, or a warm-up longer than the run.
    """
    optim, total = config.optim, config.total_steps
    start, peak, end = optim.warmup_lr, optim.peak_lr, optim.end_lr
    decays = {
        "cosine": lambda t: end + (peak - end) * (1 + jnp.cos(jnp.pi * t)) / 2,
        "linear": lambda t: peak + (end - peak) * t,
        "constant": lambda t: peak,
    }
    if optim.schedule not in decays:
        raise ValueError(
            f"config.optim.schedule={optim.schedule!r} is not one of {sorted(decays)}."
        )
    if not 0 <= optim.warmup_steps <= total:
        raise ValueError(
            f"config.optim.warmup_steps={optim.warmup_steps} must lie between 0 and "
            f"config.total_steps={total}."
        )
    warmup, decay = optim.warmup_steps, decays[optim.schedule]

    def learning_rate(count):  # count: updates done before this one
        n = count + 1
        rising = start + (peak - start) * (n - 1) / max(warmup - 1, 1)
        falling = decay(jnp.minimum((n - warmup) / max(total - warmup, 1), 1.0))
        return jnp.where(n <= warmup, rising, falling)

    return learning_rate


def frozen_mask(config, params: Any) -> Any:
    """True for parameters found by a pattern of `config.optim.frozen`: no gradient, no update.

    Raises:
      ValueError: a pattern that finds no parameter.
    """
    names = [rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in config.optim.frozen:
        if not any(re.search(pattern, name) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            raise ValueError(
                f"config.optim.frozen: {pattern!r} finds no parameter; did you mean {close[0]!r}?"
            )
    frozen = [(pattern, True) for pattern in config.optim.frozen]
    return rules.match(params, [*frozen, ("", False)], "config.optim.frozen")


def make_optimizer(config, params: Any) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax chain of a run.

    Args:
      config: the run's configuration; reads `optim` and `total_steps`.
      params: the parameters, or their ShapeDtypeStructs.

    Returns:
      The transformation and its learning-rate schedule.

    Raises:
      ValueError: a setting that is out of range. The transformation's `init` raises it for a
        parameter that no rule of `config.optim.decay_rules` covers.
    """
    optim = config.optim
    if optim.clip_norm < 0:
        raise ValueError(f"config.optim.clip_norm={optim.clip_norm} must be >= 0 (0: no clipping).")
    schedule = make_schedule(config)
    adamw = optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=lambda tree: rules.match(tree, optim.decay_rules, "config.optim.decay_rules"),
    )
    frozen = frozen_mask(config, params)
    groups = {True: optax.set_to_zero(), False: adamw}
    return (
        optax.chain(
            optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
            optax.partition(groups, frozen),
        ),
        schedule,
    )
