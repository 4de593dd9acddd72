"""DeCLIP RN50 on its 88 million pairs, with SGD.

Prepare data first, docs/prepare.md: `python -m declip_jax.prepare jsonl --output data/declip88m …`
and, for the augmented captions, `… prepare synonyms --output data/synonyms.json.gz …`.

The published file has 128 pairs a GPU but not the number of GPUs, and its 46,001 steps are marked
"for testing": batch and steps are those of YFCC15M.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.method = "declip"
    common.set_variant(config, "RN50")
    config.loss.weights = {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn_text": 0.2}
    config.loss.max_scale = 100.0
    config.loss.logit_scale_range = (3.0, 6.0)  # published: no upper limit; see docs/methods.md
    config.data.source = "data/declip88m"
    config.data.workers = 8
    config.data.synonyms = "data/synonyms.json.gz"
    config.optim.name = "sgd"
    config.optim.peak_lr = 0.2
    config.optim.warmup_lr = 1e-3
    config.optim.weight_decay = 1e-4
    config.optim.decay_rules = (("", True),)  # norms, biases and the logit scale too
    # The published rate of the logit scale starts at 1e-4 where the others' starts at 1e-3.
    config.optim.lr_rules = ((r"^logit_scale$", 0.1), ("", 1.0))
    return common.finish(config, arg)
