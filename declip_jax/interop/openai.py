"""OpenAI's CLIP layout, which ALIP shares, and open_clip too unless the projection of texts has a
bias (then it is a linear layer there, otherwise a bare matrix) or the logits have one."""

from declip_jax.interop.layers import IMAGE, array, linear, text
from declip_jax.interop.tables import Layout, Transform

# Sizes that OpenAI's archives hold as arrays. They tell these from the others' files.
SIZES = ("input_resolution", "context_length", "vocab_size")

# open_clip may have it as an array of one.
_SCALE = Transform("[] or [1] -> []", lambda x: x.reshape(()), lambda x: x)
# The causal mask is a constant.
_IGNORED = (r".*\.num_batches_tracked", r"(.*\.)?attn_mask", "|".join(SIZES))


def layout(kind: str, proj_bias: bool = False, logit_bias: bool = False) -> Layout:
    """The table for an image tower of a kind ("vit" or "resnet")."""
    matrix = [array("text/proj/kernel", "text_projection")]
    scalars = ("logit_scale", "logit_bias") if logit_bias else ("logit_scale",)
    entries = (
        *IMAGE[kind],
        *text(),
        *(linear("text/proj", "text_projection") if proj_bias else matrix),
        *(array(name, name, _SCALE) for name in scalars),
    )
    return Layout(entries, _IGNORED)
