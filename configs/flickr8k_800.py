"""A small CLIP on 800 photographs with five captions each: learns them by heart on two CPU cores.

Prepare data first, as docs/prepare.md shows: `python -m declip_jax.prepare csv … --output
data/flickr8k_800`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.batch_size = 128
    config.total_steps = 1200

    config.model.embed_dim = 128
    config.model.image = dict(kind="vit", resolution=64, patch=16, width=128, layers=4, heads=4)
    config.model.text.update(context=32, width=128, layers=2, heads=4)
    config.model.dtype = "float32"
    config.loss.logit_scale_range = (0.0, 4.6052)  # exp: 1 … 100

    config.views.weak.update(crop_scale=(0.8, 1.0), flip=0.5)

    config.data.source = "data/flickr8k_800"

    config.optim.peak_lr = 1e-3
    config.optim.warmup_steps = 100

    config.log_every = 20
    config.checkpoint.every = 300
    config.checkpoint.best_metric = "val/retrieval/text_to_image_r1"

    config.eval.every = 300
    config.eval.batch_size = 128
    config.eval.preprocess = "train"
    config.eval.retrieval.source = "data/flickr8k_800"
    config.eval.retrieval.split = "train"  # whether it can learn photographs, not generalization
    return common.finish(config, arg)
