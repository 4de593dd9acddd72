"""The causal text transformer of CLIP (Radford et al., https://arxiv.org/abs/2103.00020)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models import transformer
from declip_jax.models.features import TextFeatures
from declip_jax.models.init import linear_bias
from declip_jax.models.tower import Tower
from declip_jax.models.transformer import Compute
from declip_jax.section import at_least


def real_tokens(tokens: jax.Array, eot_id: int) -> jax.Array:
    """True up to and with the first `eot_id` of each row [..., L], and everywhere without one."""
    is_eot = tokens == eot_id
    return jnp.cumsum(is_eot, axis=-1) - is_eot == 0


class Text(Tower):
    """`config.model.text`."""

    vocab_size: int = at_least(1)
    eot_id: int = at_least(0)  # the id at whose first place a text ends
    context: int = at_least(1)  # tokens at most
    width: int = at_least(1)
    layers: int = at_least(1)
    heads: int = at_least(1)
    proj_bias: bool  # of the projection into the common space

    def demands(self, where):
        fits, known = self.width % self.heads == 0, self.eot_id < self.vocab_size
        yield fits, "width", f"a multiple of {where}.heads={self.heads}"
        yield known, "eot_id", f"an id below {where}.vocab_size={self.vocab_size}"

    def build(self, embed_dim, activation, compute):
        return TextTransformer(self, embed_dim, activation, compute)

    @classmethod
    def recognize(cls, shapes):
        vocab_size, width = shapes.of("text/token_embedding/embedding", 2)
        return cls(
            vocab_size=vocab_size,
            eot_id=min(49407, vocab_size - 1),  # OpenAI's id; of a small vocabulary the last
            context=shapes.of("text/positional_embedding", 2)[0],
            width=width,
            layers=shapes.of("text/blocks/ln_1/scale", 2)[0],
            heads=max(1, width // 64),
            proj_bias="text/proj/bias" in shapes,
        )


class TextTransformer(nn.Module):
    """Tokens int32 [B, L] -> features, the embedding read at the end of the text.

    That is the first `eot_id` of a row, or its last position when there is none. The attention is
    causal, so what follows (padding) does not matter, and batches may be cut to their longest
    caption. L may exceed an odd context by one column of padding, which has no position of its
    own: some attention kernels want even lengths.

    Raises ValueError: more tokens than learned positions.
    """

    config: Text
    embed_dim: int
    activation: str
    compute: Compute

    @nn.compact
    def __call__(self, tokens: jax.Array) -> TextFeatures:
        config, compute, length = self.config, self.compute, tokens.shape[1]
        padding = max(length - config.context, 0)
        if padding > config.context % 2:
            raise ValueError(
                f"captions have {length} tokens, but config.model.text.context={config.context}: "
                "cut the captions or raise the context"
            )
        width, normal = config.width, nn.initializers.normal
        positions = self.param("positional_embedding", normal(0.01), (config.context, width))
        rows = dict(num_embeddings=config.vocab_size, features=width)
        embed = nn.Embed(**rows, embedding_init=normal(0.02), name="token_embedding")
        positions = jnp.pad(positions[:length], ((0, padding), (0, 0)))  # [L, width]
        x = (embed(tokens) + positions).astype(compute.dtype)  # [B, L, width]
        sizes = config.layers, width, config.heads
        x, _ = transformer.blocks(
            *sizes, causal=True, activation=self.activation, compute=compute, name="blocks"
        )(x)
        words = transformer.LayerNorm(name="ln_final")(x)
        end = real_tokens(tokens, config.eot_id).sum(axis=1) - 1  # [B]
        last = jnp.take_along_axis(words, end[:, None, None], axis=1)[:, 0]  # [B, width]
        start = dict(kernel_init=normal(width**-0.5), bias_init=linear_bias(width))
        how = dict(use_bias=config.proj_bias, dtype=compute.dtype)
        proj = nn.Dense(self.embed_dim, **start, **how, name="proj")
        return TextFeatures(proj(last), words)
