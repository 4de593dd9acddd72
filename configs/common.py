"""Every field that a run reads, with the published CLIP recipe's values.

An experiment is a file beside this one: `get_config(arg)` starts from here and changes what
differs. `--config configs/NAME.py:tiny` makes any of them a smoke run of a few steps that takes
seconds on a CPU. Any field can be set on the command line: `--config.optim.peak_lr=5e-4`.
"""

from ml_collections import ConfigDict

from declip_jax.models.variants import variant


def get_config(arg: str = "") -> ConfigDict:
    """The common configuration: CLIP ViT-B/32, 4,096 pairs a step, 128,000 steps."""
    return finish(_common(), arg)


def _common() -> ConfigDict:
    config = ConfigDict()
    config.method = "clip"
    config.seed = 0
    config.batch_size = 4096  # pairs an optimiser step, over all devices together
    config.total_steps = 128_000

    # --- model -----------------------------------------------------------------------------------
    config.model = ConfigDict(variant("ViT-B/32"))  # embed_dim, image, text
    config.model.text.proj_bias = True  # DeCLIP's code has it; OpenAI's and open_clip's do not
    config.model.activation = "quick_gelu"  # or "gelu"
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.scan = True  # one compiled layer, or False: every layer unrolled
    config.model.remat = "none"  # what the backward pass computes again: "none", "dots", "full"

    # --- loss ------------------------------------------------------------------------------------
    config.loss = ConfigDict()
    config.loss.weights = {"clip": 1.0}  # one for each of the method's terms
    config.loss.logit_scale_range = (3.0, 6.0)  # of the parameter, a logarithm

    # --- images ----------------------------------------------------------------------------------
    config.views = ConfigDict()
    config.views.weak = dict(
        crop_scale=(0.5, 1.0),  # area of the crop, as a share of the image
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.0,
        jitter=(0.4, 0.4, 0.4, 0.1),  # brightness, contrast, saturation, hue
        jitter_prob=0.0,
        grey_prob=0.0,
        blur_prob=0.0,
        blur_sigma=(0.1, 2.0),  # pixels
    )
    config.image_mean = (0.485, 0.456, 0.406)
    config.image_std = (0.229, 0.224, 0.225)

    # --- data ------------------------------------------------------------------------------------
    config.data = ConfigDict()
    config.data.source = ""  # a directory that `prepare` wrote, or "scenes"
    config.data.split = "train"
    config.data.workers = 0  # processes that decode; 0: threads of this one
    config.data.threads = 16  # that read and decode, in each process
    config.data.prefetch = 4  # batches ready ahead of the step, in each process

    # --- optimiser -------------------------------------------------------------------------------
    config.optim = ConfigDict()
    config.optim.peak_lr = 1e-3
    config.optim.warmup_lr = 1e-4  # of the first step
    config.optim.warmup_steps = 2500
    config.optim.schedule = "cosine"  # or "linear", "constant"
    config.optim.end_lr = 0.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.98
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1
    # (pattern, decays?): the first pattern found in a parameter's name decides; each needs one
    config.optim.decay_rules = (
        (r"(bias|scale)$", False),  # norms and the logit scale too
        (r"(kernel|embedding)$", True),
    )
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
    config.eval.resize = 256  # short side before the centre crop
    config.eval.zeroshot = ConfigDict()
    config.eval.zeroshot.source = ""  # "": not evaluated during training
    config.eval.zeroshot.split = "test"
    config.eval.zeroshot.templates = ("a photo of a {}.",)
    config.eval.retrieval = ConfigDict()
    config.eval.retrieval.source = ""
    config.eval.retrieval.split = "test"
    config.eval.retrieval.prefix = ""  # put before every caption
    return config


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies the argument after the config's file name, and locks the fields."""
    if arg == "tiny":
        _tiny(config)
    elif arg:
        raise ValueError(f"config argument {arg!r} is unknown: expected 'tiny' or nothing.")
    return config.lock()


def _tiny(config: ConfigDict) -> None:
    """Shrinks sizes, not structure: the same code runs, on the drawn scenes, in seconds."""
    config.batch_size = 16
    config.total_steps = 4
    config.model.embed_dim = 32
    config.model.dtype = "float32"
    image = config.model.image
    if image.kind == "vit":
        image.update(resolution=32, patch=8, width=32, layers=2, heads=2)
    else:
        image.update(resolution=32, width=8, layers=(1, 1, 1, 1), heads=4)
    config.model.text.update(context=32, width=32, layers=2, heads=2)
    config.data.update(source="scenes", split="train", workers=0, threads=2)
    config.optim.warmup_steps = 2
    config.log_every = 1
    config.checkpoint.every = 2
    config.eval.update(every=4, batch_size=16, resize=32)
    config.eval.zeroshot.update(source="scenes", split="zeroshot")
    config.eval.retrieval.update(source="scenes", split="test")
