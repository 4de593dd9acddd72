"""The causal text transformer of CLIP (Radford et al., https://arxiv.org/abs/2103.00020)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from declip_jax.models import transformer
from declip_jax.models.init import linear_bias


class TextTransformer(nn.Module):
    """Tokens int32 [B, L], L <= context -> features [B, embed_dim].

    The feature is read at the first `eot_id` of a row, or at its last position when there is
    none. The attention is causal, so what follows that position (padding) does not matter, and
    batches may be cut to their longest caption.

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

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"captions have {length} tokens, but model.text.context={self.context}: "
                "cut the captions or raise the context"
            )
        normal = nn.initializers.normal
        positions = self.param("positional_embedding", normal(0.01), (self.context, self.width))
        x = nn.Embed(
            self.vocab_size, self.width, embedding_init=normal(0.02), name="token_embedding"
        )(tokens)
        x = (x + positions[:length]).astype(self.dtype)  # [B, L, width]
        x, _ = transformer.blocks(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            causal=True,
            activation=self.activation,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
            name="blocks",
        )(x)
        x = transformer.LayerNorm(name="ln_final")(x)
        is_eot = tokens == self.eot_id  # [B, L]
        end = jnp.where(is_eot.any(axis=1), is_eot.argmax(axis=1), length - 1)  # [B]
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]  # [B, L, width] -> [B, width]
        return nn.Dense(
            self.embed_dim,
            use_bias=self.proj_bias,
            kernel_init=normal(self.width**-0.5),
            bias_init=linear_bias(self.width),
            dtype=self.dtype,
            name="proj",
        )(x)
