"""Every configuration loads, is locked, and its smoke run trains; every field is read."""

import contextlib
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from declip_jax.data.sources import open_source
from declip_jax.parallel.mesh import shard_batch
from declip_jax.train import Setup, train

CONFIGS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


def load(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_run_takes_a_real_step(name):
    config = load(name, "tiny")
    setup = Setup(config, jax.devices()[:1])
    batches = setup.batches(open_source(config.data.source, config.data.split))
    with contextlib.closing(batches):
        batch = shard_batch(next(batches), setup.mesh)
    state, metrics = setup.jit_train_step()(setup.init_state(), batch)
    assert int(state.step) == 1
    assert np.isfinite(metrics["loss"]) and metrics["update_norm"] > 0


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


# The recipes of the published experiments: batch, steps, optimiser, model.
PUBLISHED = {
    "clip_vit_b32_yfcc15m": dict(kind="vit", width=768, embed_dim=512, frozen=True),
    "clip_rn50_yfcc15m": dict(kind="resnet", width=64, embed_dim=1024, frozen=False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    config, expected = load(name), PUBLISHED[name]
    optim = config.optim
    assert (config.batch_size, config.total_steps) == (32 * 128, 128_000)
    assert (optim.peak_lr, optim.warmup_lr, optim.warmup_steps) == (1e-3, 1e-4, 2500)
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.98, 1e-8, 0.1)
    assert (optim.schedule, optim.end_lr, optim.clip_norm) == ("cosine", 0.0, 0.0)
    assert config.views.weak.crop_scale == (0.5, 1.0) and config.views.weak.flip == 0
    assert config.loss.logit_scale_range == (3.0, 6.0)
    assert config.image_mean == (0.485, 0.456, 0.406)
    assert config.model.activation == "quick_gelu" and config.model.text.proj_bias
    assert config.model.image.kind == expected["kind"]
    assert config.model.image.width == expected["width"]
    assert config.model.embed_dim == expected["embed_dim"]
    assert bool(optim.frozen) == expected["frozen"]


def test_unknown_argument():
    with pytest.raises(ValueError, match="config argument 'tyni' is unknown"):
        common.get_config("tyni")


class Recorder:
    """A configuration that notes which leaves are read; writing it out does not count."""

    def __init__(self, config, seen, prefix=""):
        self._config, self._seen, self._prefix = config, seen, prefix

    def __getitem__(self, name):
        if "." in name:
            head, rest = name.split(".", 1)
            return self[head][rest]
        value = self._config[name]
        if isinstance(value, ConfigDict):
            return Recorder(value, self._seen, f"{self._prefix}{name}.")
        self._seen.add(self._prefix + name)
        return value

    def __getattr__(self, name):
        return self[name] if name in self._config else getattr(self._config, name)

    def __iter__(self):
        return iter(self._config)


def leaves(config, prefix=""):
    for name in config:
        value = config[name]
        yield from (
            leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
        )


def test_every_field_is_read(tmp_path):
    config = common.get_config("tiny").unlock()
    config.total_steps = 1
    config.optim.warmup_steps = 0
    config.eval.every = 1
    # Operations with probability 0 are left out of the program, and so are their settings.
    config.views.weak.update(jitter_prob=0.5, grey_prob=0.5, blur_prob=0.5)
    config.lock()
    seen = set()
    train(Recorder(config, seen), tmp_path)
    assert set(leaves(config)) - seen == set()
    # The recorder does tell what is not read.
    unread = set()
    Recorder(config, unread).optim.peak_lr  # noqa: B018
    assert unread == {"optim.peak_lr"}
