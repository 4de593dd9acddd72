"""The training state: one pytree that holds all that a step reads and writes."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to continue exactly, but for the position in the data."""

    step: jax.Array  # int32 scalar, optimizer steps done
    params: Any  # what the optimizer updates
    opt_state: Any  # the optimizer's own state
    model_state: Any  # all other state of the method: BN statistics, support set, running means
    ema: Any  # exponential moving average of the parameters, or None when it is off
    rng: jax.Array  # key that, folded with `step`, gives every random number of a step

    @property
    def eval_params(self):
        """The parameters to evaluate with: the moving average if there is one."""
        return self.params if self.ema is None else self.ema
