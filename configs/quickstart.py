"""CLIP on drawn scenes: no download, learns on two CPU cores in three minutes."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.batch_size = 128
    config.total_steps = 1000

    config.model.embed_dim = 128
    config.model.image = dict(kind="vit", resolution=48, patch=8, width=128, layers=4, heads=4)
    config.model.text.update(context=32, width=128, layers=3, heads=4)
    config.model.dtype = "float32"
    config.loss.logit_scale_range = (0.0, 4.6052)  # exp: 1 … 100

    config.views.weak.crop_scale = (0.9, 1.0)  # positions are part of the captions
    config.image_mean = config.image_std = (0.5, 0.5, 0.5)

    config.data.source = "scenes"
    config.data.threads = 2

    config.optim.peak_lr = 1e-3
    config.optim.warmup_steps = 50

    config.log_every = 20
    config.checkpoint.every = 500
    config.checkpoint.best_metric = "val/zeroshot/top1"

    config.eval.every = 250
    config.eval.batch_size = 128
    config.eval.resize = 48
    config.eval.zeroshot.source = "scenes"
    config.eval.zeroshot.split = "zeroshot"
    config.eval.zeroshot.templates = ("a {}.", "there is a {}.", "a picture of a {}.")
    config.eval.retrieval.source = "scenes"
    return common.finish(config, arg)
