"""What a new run starts from: the model of another run, or of another program's file."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from declip_jax.interop.transfer import fit
from declip_jax.state import TrainState
from declip_jax.step import Setup
from declip_jax.trained import read


def start(setup: Setup, say: Callable[[str], Any]) -> TrainState:
    """A run's first state with the model that `config.init_from` names.

    `say` is told what was taken, and what was not. Raises ValueError for a file that cannot be
    used, or another model.
    """
    config = setup.config
    given = read(config.init_from)
    say(f"Starts from {given.describe()}.")
    state = setup.init_state()
    fresh = {"params": state.params}
    if "batch_stats" in state.model_state:
        fresh["batch_stats"] = state.model_state["batch_stats"]
    taken, notes = fit(given, fresh, config.model, config.init_resize)
    here = config.image_mean, config.image_std
    if given.mean and given.std and here != (given.mean, given.std):
        notes.append(
            f"its images were normalized with mean {given.mean} and deviation {given.std}, those "
            f"of this run are with {here[0]} and {here[1]}"
        )
    for note in notes:
        say(f"  {note}")

    def place(value: np.ndarray, leaf: jax.Array) -> jax.Array:
        if value.shape == leaf.shape:
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: value[at])
        # The first rows, of tokens. By a program, since other processes may hold other parts.
        put = jax.jit(
            lambda leaf, rows: leaf.at[: len(rows)].set(rows), out_shardings=leaf.sharding
        )
        return put(leaf, value)

    leaves = flatten_dict(fresh)
    leaves |= {path: place(value, leaves[path]) for path, value in flatten_dict(taken).items()}
    variables = unflatten_dict(leaves)
    params = variables.pop("params")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema, model_state={**state.model_state, **variables})
