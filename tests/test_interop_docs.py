"""docs/interop.md, run as it stands: every command and every program in it, in order."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from configs import clip_vit_b32_yfcc15m, declip_vit_b32_yfcc15m  # noqa: E402
from declip_jax import trained  # noqa: E402
from declip_jax.interop import pretrained, tables  # noqa: E402
from declip_jax.train import train  # noqa: E402
from tests.commands import user_environment  # noqa: E402

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs/interop.md").read_text(), re.S)


def tiny(experiment, workdir, changes):
    """The model of a run of one step."""
    config = experiment.get_config("tiny").unlock()
    config.total_steps = config.optim.warmup_steps = 1
    config.eval.every = 0
    config.update_from_flattened_dict(changes)
    with open(workdir.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log):
        train(config.lock(), workdir)
    return trained.read_run(workdir).model


def tensors(model, format, prefix=""):
    kind, proj_bias = model.model["image"]["kind"], model.model["text"]["proj_bias"]
    arrays = tables.dump(
        pretrained.layout_of(format, kind, model.method, proj_bias), model.variables
    )
    return {prefix + name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the run and the published files that the page speaks of, but small."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "runs").mkdir()
    # Sizes that all formats with its activation can hold.
    towers = ("image", "text")
    sizes = {f"model.{t}.{n}": v for t in towers for n, v in {"width": 64, "heads": 1}.items()}
    tiny(clip_vit_b32_yfcc15m, folder / "runs" / "mine", {"ema_decay": 0.5, **sizes})

    model = tiny(clip_vit_b32_yfcc15m, folder / "other", {"model.text.proj_bias": False})
    openai = tensors(model, "openai")
    openai["token_embedding.weight"] = openai["token_embedding.weight"][:-1]  # without the mask
    openai = {name: tensor.half() for name, tensor in openai.items()}
    openai |= dict.fromkeys(pretrained.openai.SIZES, torch.tensor(32))
    torch.save(openai, folder / "ViT-B-32.pt")
    model = tiny(declip_vit_b32_yfcc15m, folder / "declip", {})
    state_dict = tensors(model, "declip", prefix="module.")
    torch.save({"model": state_dict, "last_iter": 1}, folder / "declip_vitb32.pth.tar")
    rng = np.random.default_rng(0)
    cv2.imwrite(str(folder / "photo.jpg"), rng.integers(0, 255, (60, 90, 3), np.uint8))
    return folder


def test_the_page_runs(folder):
    assert [language for language, _ in BLOCKS].count("python") >= 3
    environment = {
        **user_environment(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    for language, text in BLOCKS:
        command = ["bash", "-ec", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        if "--verify" in text:
            found = re.findall(r"\d\.\de-\d\d", done.stdout)
            assert len(found) == 6 and all(float(value) < 1e-5 for value in found), done.stdout
    assert (folder / "published.html").stat().st_size > 1e6
    assert (folder / "runs" / "tuned" / "checkpoints" / "4").is_dir()
