"""SLIP: Mu et al., Self-supervision meets Language-Image Pre-training,
https://arxiv.org/abs/2112.12750."""

from declip_jax.losses.self_supervised import nt_xent
from declip_jax.methods.base import Definition, Inputs, Network, Views
from declip_jax.methods.clip import clip
from declip_jax.models.heads import Mlp


class SlipNetwork(Network):
    simclr: Mlp

    @classmethod
    def heads(cls, model, loss):
        widths = (model.heads.simclr_hidden, model.heads.simclr_hidden, model.heads.simclr)
        simclr = Mlp(widths, last_norm=False, dtype=model.compute.dtype)
        return {**super().heads(model, loss), "simclr": simclr}

    def features(self, image, text, batch, train):
        return {
            **super().features(image, text, batch, train),
            "simclr": self.simclr(image.pooled[:, 1:], train),  # [B, 2, C], of the strong views
        }


def simclr(x: Inputs):
    h1, h2 = x.features["simclr"][:, 0], x.features["simclr"][:, 1]
    return nt_xent(h1, h2, x.loss.temperature, x.info_nce)


METHOD = Definition(
    views=lambda loss: Views(image=("weak", "strong", "strong"), text=("caption",)),
    network=SlipNetwork,
    terms={"clip": clip, "simclr": simclr},
)
