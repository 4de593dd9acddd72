"""CLIP on drawn scenes: nothing to download, learns in about three minutes on two CPU cores.

The image tower is a ResNet of a few narrow blocks: trained to name the shape of single objects, one
was right 95 % of the time after 150 steps, where a vision transformer of like cost was at 50 %.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.batch_size = 128
    config.total_steps = 700

    config.model.embed_dim = 128
    config.model.image = dict(
        kind="resnet", resolution=32, width=24, layers=(1, 1, 1, 1), heads=8, bn_group_size=0
    )
    config.model.text.update(context=24, width=96, layers=1, heads=3)
    config.model.dtype = "float32"
    config.loss.logit_scale_range = (0.0, 4.6052)  # exp: 1 … 100

    config.views.weak.crop_scale = (0.9, 1.0)  # captions tell where things are
    config.image_mean = config.image_std = (0.5, 0.5, 0.5)

    config.data.source = "scenes"
    config.data.threads = 2

    config.optim.peak_lr = 4e-3
    config.optim.warmup_steps = 50

    config.log_every = 20
    config.checkpoint.every = 200
    config.checkpoint.best_metric = "val/zeroshot/top1"

    config.eval.every = 200
    config.eval.batch_size = 128
    config.eval.resize = 32
    config.eval.zeroshot.source = "scenes"
    config.eval.zeroshot.split = "zeroshot"
    config.eval.zeroshot.templates = ("a {}.", "there is a {}.", "a picture of a {}.")
    config.eval.retrieval.source = "scenes"
    return common.finish(config, arg)
