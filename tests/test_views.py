"""The picture of a run's views: what it shows is what the run's first step sees."""

import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import declip_vit_b32_yfcc15m
from declip_jax import drawing
from declip_jax.data.sources import open_source
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.methods import Aux
from declip_jax.step import Setup, make_init, make_train_step
from tests.commands import ROOT, user_environment


@pytest.fixture(scope="module")
def config():
    config = declip_vit_b32_yfcc15m.get_config("tiny").unlock()
    config.data.eda = ("swap", "delete")
    config.seed = 3
    return config.lock()


@pytest.fixture(scope="module")
def drawn(config):
    return drawing.draw_samples(Setup(config), records=3, draws=2)


def test_the_first_draw_is_what_the_first_step_sees(config, drawn):
    setup = Setup(config)
    batches = setup.batches(open_source(config.data.source, config.data.split))
    batch = next(batches)
    batches.close()

    # A model of one number, and a loss that shows the images which the step made.
    method = setup.method._replace(
        init=lambda rng: ({"x": jnp.zeros(())}, {}),
        loss=lambda params, model_state, batch, rng: (
            0.0,
            Aux({"image": batch["image"]}, model_state),
        ),
        constrain=lambda params: params,
    )
    tx = optax.sgd(0.1)
    step = make_train_step(method, tx, lambda step: 0.1, {"x": False}, setup.augment_batch)
    _, seen = jax.jit(step)(make_init(method, tx, config.seed, ema=False)(), batch)
    images = np.asarray(seen["image"]) * config.image_std + config.image_mean

    for row, sample in enumerate(drawn):
        np.testing.assert_allclose(sample.images[0], images[row], atol=1e-5)
        assert sample.texts[0] == drawing.read_texts(batch, row, setup.method.views.text)


def test_other_draws_are_of_the_same_record(config, drawn):
    source = open_source(config.data.source, config.data.split)
    for sample in drawn:
        assert not np.allclose(*sample.images, atol=0.1)
        assert -1e-6 < sample.images.min() and sample.images.max() < 1 + 1e-6
        record = source[int(sample.key.split("-")[1])]
        np.testing.assert_array_equal(sample.original, record["image"])


def test_texts_are_read_off_the_tokens():
    text = "a dog , café 🐶 日本 supercalifragilistic"
    (tokens,) = CLIP_TOKENIZER.encode([text], 24)
    inner = tokens[1 : (tokens == CLIP_TOKENIZER.end).argmax()]
    assert CLIP_TOKENIZER.decode(inner) == text
    labels = np.full_like(tokens, -1)
    hidden = tokens.copy()
    for place in (1, 2):
        labels[place], hidden[place] = tokens[place], CLIP_TOKENIZER.mask
    batch = {"tokens": np.stack([[tokens, hidden]]), "mlm_labels": labels[None]}
    assert drawing.read_texts(batch, 0, ("caption", "masked")) == [
        ("caption", text),
        ("masked", "[mask] [mask] , café 🐶 日本 supercalifragilistic"),
        ("to predict", "a, dog"),
    ]
    assert CLIP_TOKENIZER.decode([]) == ""


def test_every_view_is_on_the_page(tmp_path):
    gray = np.full((20, 40, 3), 128, np.uint8)
    images = np.zeros((2, 3, 8, 8, 3))  # [draws, V, ...]
    images[..., 0], images[0, 1, ..., 2] = 1.0, 1.0  # red; in one view magenta
    texts = [[("masked", "costs $\\frac 5$ " + 90 * "and so on "), ("to predict", "")]] * 2
    samples = [drawing.Sample(key, gray, images, texts) for key in ("first", "second")]
    out = tmp_path / "views.png"
    drawing.draw_page(samples, ["one", "two", "three\nflip", "text\nat most"], str(out))
    page = cv2.imread(str(out))[:, :, ::-1]
    assert page.shape[1] == drawing.WIDTH

    def squares(color):
        return (page == color).all(axis=-1).sum() / drawing.CELL**2

    assert 9.5 < squares((255, 0, 0)) <= 10
    assert 1.9 < squares((255, 0, 255)) <= 2
    assert 0.9 < squares((128, 128, 128)) <= 1.01  # once for each sample, half a cell high
    assert (page[:, -5:] == 255).all()  # long texts are wrapped and cut off


def test_command_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "declip_jax.views", "--records=1", "--draws=1"]
        return subprocess.run(
            [*command, "--config=configs/quickstart.py:tiny", *arguments],
            cwd=ROOT, env=user_environment(), capture_output=True, text=True,
        )  # fmt: skip

    out = tmp_path / "views.png"
    result = run(f"--out={out}", "--config.views.strong.flip=1")
    assert result.returncode == 0, result.stderr
    assert str(out) in result.stdout and cv2.imread(str(out)) is not None
    result = run(f"--out={out}", "--config.views.strong.flip=3")
    assert result.returncode == 1
    assert result.stderr.strip() == ("error: config.views.strong.flip=3.0 must lie in 0 … 1.")
