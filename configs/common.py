"""Every field that a run reads, with the published CLIP recipe's values.

An experiment is a file beside this one: `get_config(arg)` starts from here and changes what
differs. `--config configs/NAME.py:tiny` makes any of them a smoke run of a few steps that takes
seconds on a CPU. Any field can be set on the command line: `--config.optim.peak_lr=5e-4`.
"""

import math

from ml_collections import ConfigDict, config_dict

from declip_jax.models.text import Text
from declip_jax.models.two_towers import read_image
from declip_jax.models.variants import variant


def get_config(arg: str = "") -> ConfigDict:
    """The common configuration: CLIP ViT-B/32, 4,096 pairs a step, 128,000 steps."""
    return finish(_common(), arg)


def _common() -> ConfigDict:
    config = ConfigDict()
    config.method = "clip"
    config.seed = 0
    config.batch_size = 4096  # pairs an optimizer step, over all devices together
    config.total_steps = 128_000
    config.microbatches = 1  # parts that a batch is encoded in, one after the other

    # --- model -----------------------------------------------------------------------------------
    # embed_dim, image, text. The towers' fields, with a comment each, are those of models/vit.py,
    # resnet.py and text.py; docs/towers.md tells of their options, which `finish` adds.
    config.model = ConfigDict(variant("ViT-B/32"))
    config.model.text.proj_bias = True  # DeCLIP's code has it; OpenAI's and open_clip's do not
    config.model.activation = "quick_gelu"  # or "gelu"
    config.model.attention = "xla"  # or "cudnn": NVIDIA GPUs, bfloat16
    config.model.heads = dict(  # widths of the methods' own layers
        projector=1024,  # DeCLIP: SimSiam's projector, hidden and out
        predictor=512,  # DeCLIP: SimSiam's predictor, hidden
        simclr_hidden=4096,  # SLIP
        simclr=256,  # SLIP: out
        dense=256,  # FILIP: of each token
    )
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.scan = True  # one compiled layer, or False: every layer unrolled
    config.model.remat = "none"  # what the backward pass computes again: "none", "dots", "full"
    config.model.init_logit_scale = math.log(1 / 0.07)  # a logarithm
    # SigLIP's is -10. Losses with a softmax do not see it.
    config.model.init_logit_bias = config_dict.placeholder(float)  # none

    # What a new run starts from: weights of open_clip, Transformers, OpenAI, DeCLIP or ALIP (a file
    # or a folder, see docs/interop.md), or another run's workdir. "": drawn anew.
    config.init_from = ""
    config.init_resize = False  # fit its positions to this image size and context, else refuse

    # --- loss ------------------------------------------------------------------------------------
    config.loss = ConfigDict()
    config.loss.weights = {"clip": 1.0}  # one for each of the method's terms
    config.loss.logit_scale_range = (3.0, 6.0)  # of the parameter, a logarithm
    config.loss.max_scale = 0.0  # cap of its exponential; 0: none
    config.loss.temperature = 0.1  # SLIP: of NT-Xent
    config.loss.contrast_masked = True  # MLM methods: contrast the masked caption, or a whole copy
    # MLM head: it runs on so many places for each position, padding included. Masked positions that
    # find none are left out, and counted in the metric mlm_dropped.
    config.loss.mlm_capacity = 0.2
    config.loss.support_set = dict(
        size=65_536,  # rows
        neighbors=1,  # each query's nearest so many
        young_steps=2,  # metric: share of neighbors enqueued within so many steps
    )
    config.loss.late_interaction = dict(
        tokens=16,  # of each sample that the other modality sees; 0: all
        mask_padding=False,  # keep padding out of selection, maximum and mean
        all_views=False,  # DeFILIP: mean over all four pairs of views, not the first alone
    )
    config.loss.adaptive = dict(momentum=0.99, gamma=2.0)  # ALIP: running means, gates' exponent
    config.loss.ring_threshold = 8192  # pairs from which logits are made block by block
    config.loss.block = 1024  # rows of such a block

    # --- images ----------------------------------------------------------------------------------
    config.views = ConfigDict()
    config.views.weak = dict(
        crop_scale=(0.5, 1.0),  # area of the crop, as a share of the image
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.0,
        jitter=(0.4, 0.4, 0.4, 0.1),  # brightness, contrast, saturation, hue
        jitter_prob=0.0,
        grayscale_prob=0.0,
        blur_prob=0.0,
        blur_sigma=(0.1, 2.0),  # pixels
    )
    config.views.strong = dict(  # MoCo v2's
        crop_scale=(0.2, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.5,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_prob=0.8,
        grayscale_prob=0.2,
        blur_prob=0.5,
        blur_sigma=(0.1, 2.0),
    )
    config.image_mean = (0.485, 0.456, 0.406)
    config.image_std = (0.229, 0.224, 0.225)

    # --- data ------------------------------------------------------------------------------------
    config.data = ConfigDict()
    config.data.source = ""  # shards, Parquet, TFDS, prepared: see docs/data.md; or "scenes"
    config.data.split = "train"
    # What the source calls its fields; "" and (): the usual names.
    config.data.columns = dict(image="", captions=(), synthetic=(), key="", label="")
    # Several sources instead of one: (dict(source="a", weight=3.0), dict(source="b", weight=1.0)),
    # each with a split and columns of its own if need be; weights are shares of the samples.
    config.data.mixture = ()
    config.data.index_cache = ""  # folder for indices of shards; "": beside them
    # More records that cannot be used than this share of a window's samples end the run.
    config.data.max_bad_fraction = 0.01
    config.data.bad_window = 10_000  # samples
    config.data.workers = 0  # processes that decode; 0: threads of this one
    # That read and decode, in each process; 0: by the number of cores. Object stores want many.
    config.data.threads = 0
    config.data.prefetch = 4  # batches ready ahead of the step, in each process; at least 2
    # A batch has the first of these lengths, or the context, that holds its longest caption.
    config.data.token_lengths = (16, 32, 48)
    config.data.mask_rate = 0.15  # MLM: share of a caption's tokens to predict
    config.data.eda = ("synonym", "swap", "delete")  # caption augmentation: one of these
    config.data.synonyms = ""  # file written by `prepare synonyms`, for "synonym"

    # --- optimizer -------------------------------------------------------------------------------
    config.optim = ConfigDict()
    config.optim.name = "adamw"  # or "lamb", "sgd" (with Nesterov momentum)
    config.optim.peak_lr = 1e-3
    config.optim.warmup_lr = 1e-4  # of the first step
    config.optim.warmup_steps = 2500
    config.optim.schedule = "cosine"  # or "linear", "constant", "one_cycle"
    config.optim.end_lr = 0.0
    config.optim.b1 = 0.9  # "one_cycle" adds 0.05 at the ends and takes off 0.05 at the peak
    config.optim.b2 = 0.98
    config.optim.eps = 1e-8
    config.optim.momentum = 0.9  # of "sgd"
    config.optim.weight_decay = 0.1
    # (pattern, decays?): the first pattern found in a parameter's name decides; each needs one
    config.optim.decay_rules = (
        (r"(bias|scale|scale_dense)$", False),  # norms and the logit scales too
        (r"(kernel|embedding)$", True),
    )
    # (pattern, factor): of the learning rate; the first pattern found decides
    config.optim.lr_rules = (("", 1.0),)
    config.optim.frozen = ()  # patterns of parameters that are never updated
    config.optim.clip_norm = 0.0  # of the whole gradient; 0: no clipping
    config.ema_decay = 0.0  # moving average of the parameters, to evaluate with; 0: none

    # --- machine ---------------------------------------------------------------------------------
    config.mesh = dict(data=-1, fsdp=1)  # devices on each axis; -1: the rest
    config.compilation_cache = ""  # folder that keeps compiled programs between runs
    config.profile = dict(steps=())  # (first, last): an XLA profile of these steps

    # --- logs and checkpoints --------------------------------------------------------------------
    config.log_every = 50
    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000
    config.checkpoint.keep = 3  # the newest so many
    config.checkpoint.best_metric = ""  # and the best by this, e.g. "val/zeroshot/top1"

    # --- evaluation, during training and by `declip_jax.evaluate` --------------------------------
    config.eval = ConfigDict()
    config.eval.every = 0  # steps; 0: never during training
    config.eval.batch_size = 256
    # "declip": 224 of 256 pixels, ImageNet's mean; "openai": 224 of 224, CLIP's; "train": so too,
    # with the run's own mean and standard deviation
    config.eval.preprocess = "declip"
    config.eval.suite = ""  # of `declip_jax.evaluate`: by name, or a .py file
    config.eval.data_dir = "data"  # where the sets of a suite are
    config.eval.zeroshot = ConfigDict()
    config.eval.zeroshot.source = ""  # "": not evaluated during training
    config.eval.zeroshot.split = "test"
    config.eval.zeroshot.templates = ("a photo of a {}.",)
    config.eval.retrieval = ConfigDict()
    config.eval.retrieval.source = ""
    config.eval.retrieval.split = "test"
    config.eval.retrieval.prefix = ""  # put before every caption
    return config


def set_variant(config: ConfigDict, name: str) -> None:
    """Gives the model the sizes of `models.variants.variant(name)`.

    They replace what was there, since a ResNet's fields are not a vision transformer's; only
    `text.proj_bias`, which is the recipe's and not the variant's, stays. Set the towers' options
    afterwards.
    """
    proj_bias = config.model.text.proj_bias
    for section, sizes in variant(name).items():
        config.model[section] = sizes
    config.model.text.proj_bias = proj_bias
    _complete(config.model)


def _complete(model: ConfigDict) -> None:
    """Adds the towers' options that are not there."""
    for name, read in (("image", read_image), ("text", Text.read)):
        model[name] = read(model[name], f"config.model.{name}").as_dict()


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies the argument after the config's file name, completes the towers' options, and locks
    the fields."""
    if arg == "tiny":
        _tiny(config)
    elif arg:
        raise ValueError(f"config argument {arg!r} is unknown: expected 'tiny' or nothing.")
    _complete(config.model)
    return config.lock()


_TINY = {
    "vit": dict(patch=8, width=32, layers=2, heads=2),
    "resnet": dict(width=8, layers=(1, 1, 1, 1), heads=4),
}


def _tiny(config: ConfigDict) -> None:
    """Shrinks sizes, not structure: the same code runs, on the drawn scenes, in seconds."""
    config.batch_size = 16
    config.total_steps = 4
    config.model.embed_dim = 32
    config.model.dtype = "float32"
    config.model.image.update(resolution=32, **_TINY[config.model.image.kind])
    config.model.text.update(context=32, width=32, layers=2, heads=2)
    config.model.heads.update(projector=32, predictor=16, simclr_hidden=32, simclr=16, dense=16)
    config.loss.support_set.size = 64
    config.loss.late_interaction.tokens = min(config.loss.late_interaction.tokens, 4)
    config.data.update(source="scenes", split="train", workers=0, threads=2)
    config.data.update(eda=("swap", "delete"), synonyms="")  # no file to prepare
    config.optim.warmup_steps = 2
    config.log_every = 1
    config.checkpoint.every = 2
    config.eval.update(every=4, batch_size=16, suite="")
    config.eval.zeroshot.update(source="scenes", split="zeroshot")
    config.eval.retrieval.update(source="scenes", split="test")
