"""DeCLIP ViT-B/32 on its 88 million pairs, with SGD: 300,000 steps.

Prepare data first, docs/prepare.md: `python -m declip_jax.prepare jsonl --output data/declip88m …`
and, for the augmented captions, `… prepare synonyms --output data/synonyms.json.gz …`.

The published file has 64 pairs a GPU but not the number of GPUs: the batch is that of YFCC15M.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    config = common.get_config().unlock()
    config.method = "declip"
    config.total_steps = 300_000
    config.model.embed_dim = 3072
    config.loss.weights = {"clip": 0.6, "simsiam": 0.2, "mlm": 0.2, "nn_text": 0.2}
    config.loss.max_scale = 100.0
    config.loss.logit_scale_range = (3.0, 6.0)  # published: no upper limit; see docs/methods.md
    config.data.source = "data/declip88m"
    config.data.workers = 8
    config.data.synonyms = "data/synonyms.json.gz"
    config.optim.name = "sgd"
    config.optim.peak_lr = 0.2
    config.optim.warmup_lr = 1e-3
    config.optim.warmup_steps = 5000
    config.optim.weight_decay = 0.0
    # The logit scale takes no steps. It is not `frozen`, so that its range still lifts it to 3.
    config.optim.lr_rules = ((r"^logit_scale$", 0.0), ("", 1.0))
    config.optim.frozen = (r"^image/patch_embed/",)  # the patch convolution stays as drawn
    return common.finish(config, arg)
