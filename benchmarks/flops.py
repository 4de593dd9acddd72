"""FLOPs of a training step's matrix products and convolutions, counted from the step itself.

A product [n, k] x [k, m] is 2nkm. What a training step needs, whatever the implementation computes
twice: each product forward, and once more for the gradient of each of its inputs that has one.
Images have none, nor have frozen weights, stopped features and the support set. That is what the
loss and its derivative in one direction multiply, which is counted, rather than the backward pass:
that one computes anew what rematerialization has dropped. Attention is counted in full, causal or
not. XLA's own count takes the body of a loop once.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from declip_jax.config import Config
from declip_jax.parallel.mesh import MeshShape
from declip_jax.step import Setup


def train_step_flops(config: Any, tokens: int | None = None, mlm_words: float = 1.8) -> float:
    """FLOPs of a training step, over all devices.

    Args:
      config: a run's `Config`, or the ConfigDict that it is read from.
      tokens: of each text; default: the context.
      mlm_words: masked words of a caption, which alone the MLM head need see; default: 15 % of 12.
    """
    config = Config.read(config)
    size, length = config.model.image.resolution, tokens or config.model.text.context
    # One device, which counts all; plain logits, since those in blocks are made twice.
    loss = dataclasses.replace(
        config.loss, ring_threshold=4 * config.batch_size, mlm_capacity=mlm_words / length
    )
    config = dataclasses.replace(config, loss=loss, mesh=MeshShape(data=1, fsdp=1))
    setup = Setup(config, jax.devices()[:1])
    views, state = setup.method.views, setup.abstract_state
    shapes = {
        "image": ((len(views.image), size, size, 3), jnp.float32),
        "tokens": ((len(views.text), length), jnp.int32),
        "mlm_labels": ((length,), jnp.int32),
    }
    batch = {n: jax.ShapeDtypeStruct((config.batch_size, *s), d) for n, (s, d) in shapes.items()}

    def loss_and_slope(params, direction, model_state, batch):
        def loss(params):
            params = jax.tree.map(
                lambda p, f: jax.lax.stop_gradient(p) if f else p, params, setup.frozen
            )
            return setup.method.loss(params, model_state, batch, jax.random.key(0))

        value, slope, aux = jax.jvp(loss, (params,), (direction,), has_aux=True)
        return value, slope, aux.metrics

    return count(loss_and_slope, state.params, state.params, state.model_state, batch)


def count(function, *arguments) -> float:
    """FLOPs of the products that `function` needs for what it returns."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            total += 2 * out * math.prod(shapes[0][axis] for axis in summed)
        elif name == "conv_general_dilated":
            outputs = shapes[1][params["dimension_numbers"].rhs_spec[0]]
            total += 2 * out * math.prod(shapes[1]) / outputs
        else:
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":  # shapes inside are a device's
                times = params["mesh"].size
            inner = [_count(one) for one in _inside(params)]
            if name == "while" and sum(inner):
                raise ValueError("how often a while loop with products runs is not known.")
            total += times * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def _inside(params: dict[str, Any]) -> list[Any]:
    """The programs that an equation runs."""
    values = [v for p in params.values() for v in (p if isinstance(p, list | tuple) else [p])]
    values = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in values if hasattr(value, "eqns")]
