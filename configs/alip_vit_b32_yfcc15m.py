"""ALIP ViT-B/32 on YFCC15M with a synthetic caption for each image: 8 GPUs × 512 pairs, 32 epochs.

Prepare data first, with the synthetic captions: `python -m declip_jax.prepare jsonl --output
data/yfcc15m --synthetic-field …`, docs/prepare.md.
"""

import math

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.method = "alip"
    config.batch_size = 8 * 512
    config.total_steps = 32 * math.ceil(15_061_515 / config.batch_size)

    config.model.activation = "gelu"
    config.model.text.proj_bias = False
    config.loss.weights = {"raw": 1.0, "synthetic": 1.0}
    config.loss.logit_scale_range = (0.0, math.log(100))

    config.views.weak.update(crop_scale=(0.7, 1.0), crop_ratio=(0.8, 1.25), flip=0.5)
    config.image_mean = (0.48145466, 0.4578275, 0.40821073)
    config.image_std = (0.26862954, 0.26130258, 0.27577711)
    config.data.source = "data/yfcc15m"
    config.data.workers = 8

    # torch's OneCycleLR with pct_start 0.1 and else its defaults
    config.optim.schedule = "one_cycle"
    config.optim.warmup_steps = round(0.1 * config.total_steps)
    config.optim.warmup_lr = config.optim.peak_lr / 25
    config.optim.end_lr = config.optim.warmup_lr / 1e4
    config.optim.weight_decay = 0.2
    config.optim.decay_rules = (("", True),)  # everything
    config.optim.clip_norm = 1.0

    config.eval.preprocess = "openai"
    config.eval.retrieval.prefix = "a photo of "
    return common.finish(config, arg)
