"""State dicts in OpenAI's CLIP layout, which ALIP and open_clip share."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from declip_jax.interop import tables
from declip_jax.interop.parts import RESNET, VIT, blocks, norm
from declip_jax.interop.tables import SAME, Entry, Layout

_LAYOUT = Layout(
    entries=(
        *VIT,
        *RESNET,
        Entry("params/text/token_embedding/embedding", "token_embedding.weight", SAME),
        Entry("params/text/positional_embedding", "positional_embedding", SAME),
        *blocks("text/blocks", "transformer.resblocks"),
        *norm("text/ln_final", "ln_final"),
        Entry("params/text/proj/kernel", "text_projection", SAME),
        Entry("params/logit_scale", "logit_scale", SAME),
    ),
    ignored=(r".*\.num_batches_tracked",),
)


def load(state_dict: Mapping[str, np.ndarray], like: Any) -> Any:
    """A state dict as variables like `like`; see `tables.load`."""
    return tables.load(_LAYOUT, state_dict, like)


def dump(variables: Any) -> dict[str, np.ndarray]:
    """Variables under OpenAI's names; see `tables.dump`."""
    return tables.dump(_LAYOUT, variables)
