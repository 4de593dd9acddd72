"""Runs for tests that need one: trained, or checkpoints of random values."""

import contextlib
from pathlib import Path

import cv2
import jax
import numpy as np

from configs import declip_vit_b32_yfcc15m
from declip_jax import train
from declip_jax.checkpoint import Checkpoints
from declip_jax.step import Setup


def declip_config(folder: Path):
    """Of the run that `train_declip(folder)` makes."""
    config = declip_vit_b32_yfcc15m.get_config("tiny").unlock()
    config.ema_decay = 0.5
    config.eval.update(every=2, suite=str(folder / "suite.py"), data_dir=str(folder))
    config.checkpoint.best_metric = "val/scenes/retrieval/text_to_image_r10"
    return config.lock()


def train_declip(folder: Path) -> None:
    """`folder` gets the run, its suite and that one's data, and in "printed" what it printed."""
    write_suite(folder)
    with open(folder / "printed", "w") as printed, contextlib.redirect_stdout(printed):
        train.train(declip_config(folder), folder / "run")


def write_suite(folder: Path) -> None:
    """suite.py: of what is there, what is not, and what cannot be read."""
    (folder / "birds" / "a").mkdir(parents=True)
    (folder / "birds" / "b").mkdir()
    cv2.imwrite(str(folder / "birds" / "a" / "1.png"), np.zeros((32, 32, 3), np.uint8))
    (folder / "birds" / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
    (folder / "suite.py").write_text(
        "def get_suite():\n"
        "    return [\n"
        "        dict(task='zeroshot', source='scenes', split='zeroshot'),\n"
        "        dict(task='retrieval', source='scenes', split='test', captions_per_image=1),\n"
        "        dict(task='linear_probe', set='dtd'),\n"
        f"        dict(task='zeroshot', source={str(folder / 'birds')!r}),\n"
        "    ]\n"
    )


def make_run(workdir: Path, config, steps=(1,), data="data") -> Path:
    """A run's checkpoints as training writes them, of random values."""
    setup = Setup(config, jax.devices()[:1])
    like = setup.abstract_state
    checkpoints = Checkpoints(workdir, keep=len(steps))
    for step in steps:
        rng = np.random.default_rng(step)
        state = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype(x.dtype), like)
        state = jax.device_put(state.replace(step=np.int32(step)), like.step.sharding)
        checkpoints.save(state, 16 * step, data, setup.config.record(), {})
    checkpoints.close()
    return workdir
