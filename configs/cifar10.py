"""A small CLIP on CIFAR-10 with captions made of its class names, from scratch on two CPU cores.

Prepare data first, as docs/prepare.md shows: `python -m declip_jax.prepare imagefolder … --output
data/cifar10`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.batch_size = 256
    config.total_steps = 1200

    config.model.embed_dim = 64
    config.model.image = dict(kind="vit", resolution=32, patch=8, width=128, layers=4, heads=4)
    config.model.text.update(context=16, width=64, layers=1, heads=2)
    config.model.dtype = "float32"
    config.loss.logit_scale_range = (0.0, 4.6052)  # exp: 1 … 100

    config.views.weak.update(crop_scale=(0.6, 1.0), flip=0.5)

    config.data.source = "data/cifar10"

    config.optim.peak_lr = 1.5e-3
    config.optim.warmup_steps = 100

    config.log_every = 20
    config.checkpoint.every = 300
    config.checkpoint.best_metric = "val/zeroshot/top1"

    config.eval.every = 300
    config.eval.preprocess = "train"
    config.eval.zeroshot.source = "data/cifar10"
    config.eval.zeroshot.templates = (
        "a photo of a {}.",
        "a picture of a {}.",
        "a photo of the {}.",
    )
    return common.finish(config, arg)
