"""SLIP RN50 on YFCC15M as DeCLIP trains it: 32 GPUs × 128 pairs, 128,000 steps.

Prepare data first: `python -m declip_jax.prepare jsonl --output data/yfcc15m …`, docs/prepare.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.method = "slip"
    common.set_variant(config, "RN50")
    config.loss.weights = {"clip": 1.0, "simclr": 1.0}
    config.data.source = "data/yfcc15m"
    config.data.workers = 8
    config.optim.peak_lr = 5e-4
    config.optim.weight_decay = 0.5
    return common.finish(config, arg)
