"""DeFILIP: Cui et al., Democratizing Contrastive Language-Image Pre-training: A CLIP Benchmark of
Data, Model, and Supervision, https://arxiv.org/abs/2203.05796: DeCLIP and FILIP's loss."""

from declip_jax.methods import declip, filip
from declip_jax.methods.base import Inputs


class DefilipNetwork(filip.FilipNetwork, declip.DeclipNetwork):
    """Both methods' heads."""


def filip_of_views(x: Inputs):
    """Of the first views alone, as published, or the mean over all four pairs."""
    if not x.loss.late_interaction.all_views:
        return filip.filip(x)
    return sum(filip.filip(x, image, text) for text in (0, -1) for image in (0, 1)) / 4


METHOD = declip.METHOD._replace(
    views=lambda loss: declip.METHOD.views(loss)._replace(
        padded=not loss.late_interaction.mask_padding
    ),
    network=DefilipNetwork,
    terms={**declip.METHOD.terms, "filip": filip_of_views},
)
