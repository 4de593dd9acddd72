"""DeFILIP ViT-B/32 on YFCC15M: 32 GPUs × 128 pairs, 128,000 steps.

Prepare data first, docs/prepare.md: `python -m declip_jax.prepare jsonl --output data/yfcc15m …`
and, for the augmented captions, `… prepare synonyms --output data/synonyms.json.gz …`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.method = "defilip"
    config.loss.weights = {
        "clip": 0.4,
        "simsiam": 0.2,
        "mlm": 0.2,
        "nn_text": 0.2,
        "filip": 0.2,
    }
    config.loss.max_scale = 100.0
    config.data.source = "data/yfcc15m"
    config.data.workers = 8
    config.data.synonyms = "data/synonyms.json.gz"
    config.optim.frozen = (r"^image/patch_embed/",)  # the patch convolution stays as drawn
    return common.finish(config, arg)
