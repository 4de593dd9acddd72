"""Every configuration loads, is locked, and its smoke run trains; every field is read."""

import contextlib
import dataclasses
import gzip
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from declip_jax import init_from
from declip_jax.config import Config
from declip_jax.data.sources import open_data
from declip_jax.methods import METHODS
from declip_jax.parallel.mesh import shard_batch
from declip_jax.report.published import published
from declip_jax.section import Section
from declip_jax.step import Setup
from declip_jax.train import train

CONFIGS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


def load(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def first_batch(setup):
    batches = setup.batches(open_data(setup.config.data))
    with contextlib.closing(batches):
        return shard_batch(next(batches), setup.mesh)


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_run_fits_its_batches(name):
    """The step takes what the pipeline gives and returns the state's shapes; .ci/run runs it."""
    config = load(name, "tiny")
    setup = Setup(config, jax.devices()[:1])
    batch = first_batch(setup)
    state, metrics = jax.eval_shape(setup.jit_train_step(), setup.abstract_state, batch)
    assert {"loss", "top1", "learning_rate", "grad_norm", *config.loss.weights} <= metrics.keys()

    def layout(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert layout(state) == layout(setup.abstract_state)


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_are_those_of_common(name):
    config = load(name)
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.optim.peek_lr = 1.0

    def fields(c, prefix=""):
        for key in c:
            inner = isinstance(c[key], ConfigDict) and key not in ("image", "weights")
            yield from fields(c[key], f"{prefix}{key}.") if inner else [prefix + key]

    assert set(fields(config)) == set(fields(common.get_config()))


# What the published experiments have in common, and where each differs.
RECIPE = {
    "batch_size": 4096,
    "total_steps": 128_000,
    "model.embed_dim": 512,
    "model.image.kind": "vit",
    "model.image.width": 768,
    "model.activation": "quick_gelu",
    "model.text.proj_bias": True,
    "loss.logit_scale_range": (3.0, 6.0),
    "loss.max_scale": 0.0,
    "loss.temperature": 0.1,
    "loss.support_set.size": 65_536,
    "loss.support_set.neighbors": 1,
    "loss.late_interaction.tokens": 16,
    "loss.adaptive.momentum": 0.99,
    "views.weak.crop_scale": (0.5, 1.0),
    "views.weak.flip": 0.0,
    "views.strong.crop_scale": (0.2, 1.0),
    "views.strong.flip": 0.5,
    "views.strong.jitter": (0.4, 0.4, 0.4, 0.1),
    "views.strong.jitter_prob": 0.8,
    "views.strong.grayscale_prob": 0.2,
    "views.strong.blur_prob": 0.5,
    "views.strong.blur_sigma": (0.1, 2.0),
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
    "data.source": "data/yfcc15m",
    "data.mask_rate": 0.15,
    "optim.name": "adamw",
    "optim.peak_lr": 1e-3,
    "optim.warmup_lr": 1e-4,
    "optim.warmup_steps": 2500,
    "optim.schedule": "cosine",
    "optim.end_lr": 0.0,
    "optim.b1": 0.9,
    "optim.b2": 0.98,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.1,
    "optim.lr_rules": (("", 1.0),),
    "optim.frozen": (r"^image/patch_embed/",),
    "optim.clip_norm": 0.0,
    "ema_decay": 0.0,
}
RN50 = {
    "model.embed_dim": 1024,
    "model.image.kind": "resnet",
    "model.image.width": 64,
    "model.image.layers": (3, 4, 6, 3),
    "model.image.bn_group_size": 0,
    "optim.frozen": (),
}
SLOWER = {"optim.peak_lr": 5e-4, "optim.weight_decay": 0.5}
CLIP = {"method": "clip", "loss.weights": {"clip": 1.0}, "loss.max_scale": 100.0}
SLIP = {"method": "slip", "loss.weights": {"clip": 1.0, "simclr": 1.0}, **SLOWER}
FILIP = {"method": "filip", "loss.weights": {"clip": 0.0, "filip": 1.0}, **SLOWER}
DECLIP_WEIGHTS = {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn_text": 0.2}
DECLIP = {
    "method": "declip",
    "loss.weights": DECLIP_WEIGHTS,
    "loss.max_scale": 100.0,
    "data.eda": ("synonym", "swap", "delete"),
    "data.synonyms": "data/synonyms.json.gz",
}
DECLIP_88M = {
    **DECLIP,
    "data.source": "data/declip88m",
    "loss.logit_scale_range": (3.0, 6.0),
    "optim.name": "sgd",
    "optim.momentum": 0.9,
    "optim.peak_lr": 0.2,
    "optim.warmup_lr": 1e-3,
}
PUBLISHED = {
    "clip_vit_b32_yfcc15m": CLIP,
    "clip_rn50_yfcc15m": {**CLIP, **RN50},
    "slip_vit_b32_yfcc15m": SLIP,
    "slip_rn50_yfcc15m": {**SLIP, **RN50},
    "filip_vit_b32_yfcc15m": {**FILIP, "model.embed_dim": 768},
    "filip_rn50_yfcc15m": {**FILIP, **RN50},
    "declip_vit_b32_yfcc15m": DECLIP,
    "declip_rn50_yfcc15m": {**DECLIP, **RN50},
    "defilip_vit_b32_yfcc15m": {
        **DECLIP,
        "method": "defilip",
        "loss.weights": {**DECLIP_WEIGHTS, "filip": 0.2},
    },
    "declip_rn50_declip88m": {
        **DECLIP_88M,
        **RN50,
        "optim.weight_decay": 1e-4,
        "optim.decay_rules": (("", True),),
        "optim.lr_rules": (("^logit_scale$", 0.1), ("", 1.0)),
    },
    "declip_vit_b32_declip88m": {
        **DECLIP_88M,
        "total_steps": 300_000,
        "model.embed_dim": 3072,
        "loss.weights": {**DECLIP_WEIGHTS, "clip": 0.6},
        "optim.warmup_steps": 5000,
        "optim.weight_decay": 0.0,
        "optim.lr_rules": (("^logit_scale$", 0.0), ("", 1.0)),
    },
    "alip_vit_b32_yfcc15m": {
        "method": "alip",
        "total_steps": 117_696,  # 32 epochs of 3,678
        "model.activation": "gelu",
        "model.text.proj_bias": False,
        "loss.weights": {"raw": 1.0, "synthetic": 1.0},
        "loss.logit_scale_range": (0.0, pytest.approx(4.60517, abs=1e-5)),
        "views.weak.crop_scale": (0.7, 1.0),
        "views.weak.crop_ratio": (0.8, 1.25),
        "views.weak.flip": 0.5,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "optim.schedule": "one_cycle",
        "optim.warmup_lr": pytest.approx(4e-5),
        "optim.warmup_steps": 11_770,
        "optim.end_lr": pytest.approx(4e-9),
        "optim.weight_decay": 0.2,
        "optim.decay_rules": (("", True),),
        "optim.frozen": (),
        "optim.clip_norm": 1.0,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    config = load(name)
    expected = {**RECIPE, **PUBLISHED[name]}
    found = {field: config[field] for field in expected}
    found["loss.weights"] = found["loss.weights"].to_dict()
    assert found == expected


def test_all_published_experiments_are_in_the_table():
    """Those of methods that the papers have numbers of; a trial may be called alike."""
    named = {name for name in CONFIGS if name.endswith(("_yfcc15m", "_declip88m"))}
    assert set(PUBLISHED) == {name for name in named if published(load(name).method)}


def test_logit_scale_without_steps_keeps_its_lower_limit():
    config = load("declip_vit_b32_declip88m", "tiny")
    setup = Setup(config, jax.devices()[:1])
    assert setup.method.constrain({"logit_scale": np.float32(2.66)})["logit_scale"] == 3.0
    assert not setup.frozen["logit_scale"]  # or it would stay as it is


def test_unknown_argument():
    with pytest.raises(ValueError, match="config argument 'tyni' is unknown"):
        common.get_config("tyni")


@contextlib.contextmanager
def reads_recorded(config):
    """While open, `seen` has the fields of the frozen `config` that are read, by their path."""
    places, seen = {}, set()

    def visit(value, place):
        if isinstance(value, Section):
            places[id(value)] = place
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name), f"{place}.{field.name}")
        elif isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, f"{place}.{name}")

    def read(self, name):
        if id(self) in places and name in type(self).__dataclass_fields__:
            seen.add(f"{places[id(self)]}.{name}".removeprefix("config."))
        return object.__getattribute__(self, name)

    visit(config, "config")
    record = config.record()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", read, raising=False)
        # Writing it down, or making another of it, is not heeding it.
        patch.setattr(Config, "record", lambda self: record)
        yield seen


def leaves(section, prefix=""):
    for name, value in vars(section).items() if isinstance(section, Section) else section.items():
        if isinstance(value, Section) or (isinstance(value, dict) and name != "weights"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_field_is_read_by_some_method(tmp_path):
    """Sections are made at the start; what counts is who looks at a field after that."""

    synonyms = tmp_path / "synonyms.json.gz"
    with gzip.open(synonyms, "wt") as file:
        json.dump({"red": ["crimson"]}, file)

    def smoke(method):
        config = common.get_config("tiny").unlock()
        config.method = method
        config.loss.weights = dict.fromkeys(METHODS[method].terms, 1.0)
        config.total_steps, config.optim.warmup_steps, config.eval.every = 2, 0, 2
        # Operations with probability 0 are left out of the program, and so are their settings.
        config.views.weak.update(jitter_prob=0.5, grayscale_prob=0.5, blur_prob=0.5)
        if method == "clip":  # the one that trains
            config.data.update(source="", mixture=(dict(source="scenes"),))
        else:
            config.data.update(eda=("synonym",), synonyms=str(synonyms))
            config.optim.name = "sgd"
        return Config.read(config)

    read = set()
    config = smoke("clip")
    with reads_recorded(config) as seen:
        assert int(train(config, tmp_path / "run").step) == 2
    read |= seen
    for method in set(METHODS) - {"clip"}:
        config = smoke(method)
        with reads_recorded(config) as seen:
            setup = Setup(config, jax.devices()[:1])
            # Settings are read while the step is traced.
            setup.jit_train_step().trace(setup.abstract_state, first_batch(setup))
        read |= seen
    config = dataclasses.replace(smoke("clip"), init_from=str(tmp_path / "run"))
    with reads_recorded(config) as seen:
        init_from.start(Setup(config, jax.devices()[:1]), print)
    read |= seen
    assert set(leaves(config)) - read == set()
    # What notes the reads does tell what is not read.
    with reads_recorded(config) as seen:
        assert config.optim.peak_lr > 0
    assert seen == {"optim", "optim.peak_lr"}
