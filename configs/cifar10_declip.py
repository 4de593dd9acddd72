"""DeCLIP beside the CLIP of configs/cifar10.py: the same data, towers, optimizer and pairs seen."""

from ml_collections import ConfigDict

from configs import cifar10, common


def get_config(arg: str = "") -> ConfigDict:
    config = cifar10.get_config().unlock()
    config.method = "declip"
    config.model.heads.update(projector=128, predictor=64)
    config.loss.weights = {"clip": 1.0, "simsiam": 0.2, "mlm": 0.02, "nn_text": 0.2}
    config.loss.support_set.size = 2048
    config.loss.contrast_masked = False  # the class is one word, and may be the masked one
    config.loss.mlm_capacity = 0.05
    config.views.strong.update(crop_scale=(0.6, 1.0), blur_prob=0.0)
    # A masked token costs more than the rest of its caption: 49,409 logits.
    config.data.mask_rate = 0.05
    config.data.eda = ("swap", "delete")  # synonyms would need a file
    return common.finish(config, arg)
