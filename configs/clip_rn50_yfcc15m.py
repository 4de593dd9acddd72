"""CLIP RN50 on YFCC15M as DeCLIP trains it: 32 GPUs × 128 pairs, 128,000 steps.

Prepare the data first: `python -m declip_jax.prepare jsonl --output data/yfcc15m …`, docs/data.md.
"""

from ml_collections import ConfigDict

from configs import common
from declip_jax.models.variants import variant


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    for section, sizes in variant("RN50").items():
        config.model[section] = sizes  # replaced, not merged with the ViT's
    config.model.text.proj_bias = True
    config.data.source = "data/yfcc15m"
    config.data.workers = 8
    return common.finish(config, arg)
