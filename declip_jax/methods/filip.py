"""FILIP: Yao et al., Fine-grained Interactive Language-Image Pre-Training,
https://arxiv.org/abs/2111.07783, with the token selection of DeCLIP's published code."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.losses.contrastive import normalize, positive_rank_of
from declip_jax.losses.late_interaction import filip_loss, late_interaction
from declip_jax.methods.base import Definition, Inputs, Network, Views, once
from declip_jax.methods.clip import clip
from declip_jax.models.heads import linear
from declip_jax.models.text import real_tokens


class FilipNetwork(Network):
    image_mapping: nn.Dense
    text_mapping: nn.Dense

    @classmethod
    def heads(cls, model, loss):
        dense, dtype = model.heads.dense, model.compute.dtype
        return {
            **super().heads(model, loss),
            "image_mapping": linear(model.image.token_width, dense, dtype),
            "text_mapping": linear(model.text.width, dense, dtype),
        }

    def setup(self):
        super().setup()
        start = nn.initializers.constant(self.init_logit_scale)
        self.logit_scale_dense = self.param("logit_scale_dense", start, ())

    def features(self, image, text, batch, train):
        return {
            **super().features(image, text, batch, train),
            "patches": unit(self.image_mapping(image.tokens)),  # [B, V, P, E]
            "words": unit(self.text_mapping(text.words)),  # [B, T, L, E]
        }


def unit(tokens: jax.Array) -> jax.Array:
    """Tokens [..., E] scaled to unit length in float32, in their own dtype."""
    return normalize(tokens.astype(jnp.float32)).astype(tokens.dtype)


@once
def similarities(x: Inputs, image: int = 0, text: int = 0):
    """Of all images with all texts and the reverse, [B, B] each, of one view of either."""
    options, tokens = x.loss.late_interaction, x.batch["tokens"][:, text]  # [B, L]
    return late_interaction(
        x.features["patches"][:, image],
        x.features["words"][:, text],
        tokens=options.tokens,
        text_mask=real_tokens(tokens, x.model.text.eot_id) if options.mask_padding else None,
        mesh=x.mesh,
        block=x.loss.block,
    )


def filip(x: Inputs, image: int = 0, text: int = 0):
    return filip_loss(*similarities(x, image, text), x.scales["logit_scale_dense"])


METHOD = Definition(
    views=lambda loss: Views(
        image=("strong",),
        # As published, the masked caption is contrasted.
        text=("masked",) if loss.contrast_masked else ("caption",),
        padded=not loss.late_interaction.mask_padding,
    ),
    network=FilipNetwork,
    terms={"clip": clip, "filip": filip},
    # The similarities that are trained, whatever the weights.
    rank=lambda x: positive_rank_of(similarities(x, 0, 0)[0]),
)
