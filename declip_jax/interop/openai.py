"""OpenAI's CLIP layout, which ALIP shares, and open_clip too unless the projection of texts has a
bias (then it is a linear layer there, otherwise a bare matrix) or the logits have one."""

from declip_jax.interop.layers import IMAGE, blocks, linear, norm
from declip_jax.interop.tables import SAME, Entry, Layout, Transform

# Sizes that OpenAI's archives hold as arrays. They tell these from the others' files.
SIZES = ("input_resolution", "context_length", "vocab_size")


# open_clip may have it as an array of one.
_SCALE = Transform("[] or [1] -> []", lambda x: x.reshape(()), lambda x: x)
# The causal mask is a constant.
_IGNORED = (r".*\.num_batches_tracked", r"(.*\.)?attn_mask", "|".join(SIZES))


def layout(kind: str, proj_bias: bool = False, logit_bias: bool = False) -> Layout:
    """The table for an image tower of a kind ("vit" or "resnet")."""
    return Layout(
        entries=(
            *IMAGE[kind],
            Entry("params/text/token_embedding/embedding", "token_embedding.weight", SAME),
            Entry("params/text/positional_embedding", "positional_embedding", SAME),
            *blocks("text/blocks", "transformer.resblocks"),
            *norm("text/ln_final", "ln_final"),
            *(
                linear("text/proj", "text_projection")
                if proj_bias
                else [Entry("params/text/proj/kernel", "text_projection", SAME)]
            ),
            Entry("params/logit_scale", "logit_scale", _SCALE),
            *([Entry("params/logit_bias", "logit_bias", _SCALE)] if logit_bias else []),
        ),
        ignored=_IGNORED,
    )
