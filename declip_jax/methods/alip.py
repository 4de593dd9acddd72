"""ALIP: Yang et al., Adaptive Language-Image Pre-training with Synthetic Caption,
https://arxiv.org/abs/2308.08428."""

from declip_jax.losses import adaptive
from declip_jax.methods.base import Definition, Inputs, State, Views, once


@once
def gates(x: Inputs):
    """Weights of samples and of their pairs, [B] each, and the running means with this batch."""
    options, means = x.loss.adaptive, x.state["running_means"]
    return adaptive.gates(x.image(0), x.text(0), x.text(1), means, options.momentum, options.gamma)


def raw(x: Inputs):
    weights, _ = gates(x)
    return x.contrast(x.image(0), x.text(0), weights.sample * weights.raw)


def synthetic(x: Inputs):
    weights, _ = gates(x)
    return x.contrast(x.image(0), x.text(1), weights.sample * weights.synthetic)


def metrics(x: Inputs):
    return {f"{name}_weight": weight.mean() for name, weight in gates(x)[0]._asdict().items()}


METHOD = Definition(
    views=lambda loss: Views(image=("weak",), text=("caption", "synthetic")),
    terms={"raw": raw, "synthetic": synthetic},
    state={
        "running_means": State(
            init=lambda rng, width, loss: adaptive.initial_means(),
            update=lambda means, x: gates(x)[1],
        )
    },
    metrics=metrics,
)
