"""The causal text transformer of CLIP (Radford et al., https://arxiv.org/abs/2103.00020)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models import transformer
from declip_jax.models.features import TextFeatures
from declip_jax.models.init import linear_bias


def real_tokens(tokens: jax.Array, eot_id: int) -> jax.Array:
    """True up to and with the first `eot_id` of each row [..., L], and everywhere without one."""
    is_eot = tokens == eot_id
    return jnp.cumsum(is_eot, axis=-1) - is_eot == 0


class TextTransformer(nn.Module):
    """Tokens int32 [B, L] -> features, the embedding read at the end of the text.

    That is the first `eot_id` of a row, or its last position when there is none. The attention is
    causal, so what follows (padding) does not matter, and batches may be cut to their longest
    caption. L may exceed an odd context by one column of padding, which has no position of its
    own: some attention kernels want even lengths.

    Raises:
      ValueError: more tokens than learned positions.
    """

    vocab_size: int
    eot_id: int
    context: int
    width: int
    layers: int
    heads: int
    proj_bias: bool
    embed_dim: int
    activation: str
    dtype: jnp.dtype
    scan: bool
    remat: str
    attention: str

    @nn.compact
    def __call__(self, tokens: jax.Array) -> TextFeatures:
        length = tokens.shape[1]
        padding = max(length - self.context, 0)
        if padding > self.context % 2:
            raise ValueError(
                f"captions have {length} tokens, but model.text.context={self.context}: "
                "cut the captions or raise the context"
            )
        normal = nn.initializers.normal
        positions = self.param("positional_embedding", normal(0.01), (self.context, self.width))
        x = nn.Embed(
            self.vocab_size, self.width, embedding_init=normal(0.02), name="token_embedding"
        )(tokens)
        positions = jnp.pad(positions[:length], ((0, padding), (0, 0)))  # [L, width]
        x = (x + positions).astype(self.dtype)  # [B, L, width]
        x, _ = transformer.blocks(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            causal=True,
            activation=self.activation,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
            attention=self.attention,
            name="blocks",
        )(x)
        words = transformer.LayerNorm(name="ln_final")(x)
        end = real_tokens(tokens, self.eot_id).sum(axis=1) - 1  # [B]
        last = jnp.take_along_axis(
            words, end[:, None, None], axis=1
        )  # [B, L, width] -> [B, 1, width]
        embedding = nn.Dense(
            self.embed_dim,
            use_bias=self.proj_bias,
            kernel_init=normal(self.width**-0.5),
            bias_init=linear_bias(self.width),
            dtype=self.dtype,
            name="proj",
        )(last[:, 0])
        return TextFeatures(embedding, words)
