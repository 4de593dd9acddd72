"""CLIP: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
https://arxiv.org/abs/2103.00020."""

from declip_jax.methods.base import Definition, Inputs, Views


def clip(x: Inputs):
    return x.contrast(x.image(0), x.text(0))


METHOD = Definition(
    views=lambda loss: Views(image=("weak",), text=("caption",)), terms={"clip": clip}
)
