"""One training step against values computed once by the published PyTorch code, in float32.

A file tests/golden/NAME.npz (GOLDEN_DIR names another folder) holds inputs `in/*`, weights
`param/*`, and what the published code made of them: `out/*`, `grad/*` and, of batch normalisation,
`buffer_after/*`. `meta` is JSON: the method, its sizes and its token ids.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from declip_jax import methods
from declip_jax.interop import declip
from declip_jax.losses.contrastive import normalise, similarity
from declip_jax.models.two_towers import TwoTowers, two_towers

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
assert FILES, f"no golden files in {FOLDER}"


def config_of(meta):
    config = common.get_config().unlock()
    config.method = meta["method"]
    config.model.dtype = "float32"
    config.model.embed_dim = meta["embed_dim"]
    config.model.image = dict(kind="vit", **meta["image"])
    if meta["tower"] == "rn":
        config.model.image.update(kind="resnet", bn_group_size=0)
    config.model.text = dict(
        vocab_size=meta["vocab_size"],
        eot_id=int(declip.tokens_from_theirs(np.array(meta["eot_id"]), meta["vocab_size"])),
        context=meta["context_length"],
        width=meta["text_width"],
        layers=meta["text_layers"],
        heads=meta["text_heads"],
        proj_bias=True,
    )
    return config.lock()


def clip_batch(golden, tokens_from_theirs):
    image = golden["in/image"].transpose(0, 2, 3, 1)  # [B, 3, H, W] -> [B, H, W, 3]
    tokens = tokens_from_theirs(golden["in/tokens"])
    return {"image": image[:, None], "tokens": tokens[:, None]}


def clip_outputs(towers, variables, batch, metrics):
    image, _ = towers.apply(
        variables,
        batch["image"][:, 0],
        train=True,
        method=TwoTowers.encode_image,
        mutable=["batch_stats"],
    )
    text = towers.apply(variables, batch["tokens"][:, 0], method=TwoTowers.encode_text)
    image, text = normalise(image), normalise(text)
    scale = jnp.exp(variables["params"]["logit_scale"])
    return {
        "loss": metrics["loss"],
        "logits_per_image": similarity(image, text, scale),
        "logits_per_text": similarity(text, image, scale),
    }


# method: how to read its inputs, how to compute its outputs
READERS = {"clip": (clip_batch, clip_outputs)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden(file):
    golden = dict(np.load(file, allow_pickle=False))
    meta = json.loads(golden.pop("meta").tobytes())
    if meta["method"] not in methods.METHODS:
        pytest.skip(f"method {meta['method']!r} is not in declip_jax.methods")
    to_batch, to_outputs = READERS[meta["method"]]
    config = config_of(meta)
    method = methods.build(config)

    state_dict = {
        name.removeprefix("param/"): value
        for name, value in golden.items()
        if name.startswith("param/")
    }
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    variables = declip.load(state_dict, like={"params": params, **extra})
    batch = to_batch(golden, lambda ids: declip.tokens_from_theirs(ids, meta["vocab_size"]))

    towers = two_towers(config.model)

    @jax.jit
    def step(variables, batch):
        extra = {name: value for name, value in variables.items() if name != "params"}
        (loss, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(
            variables["params"], extra, batch, jax.random.key(0)
        )
        return loss, aux, grads, to_outputs(towers, variables, batch, aux.metrics)

    loss, aux, grads, outputs = step(variables, batch)
    assert loss == aux.metrics["loss"]
    ours = {
        **{f"out/{name}": value for name, value in outputs.items()},
        **{f"grad/{name}": value for name, value in declip.dump({"params": grads}).items()},
        **{f"buffer_after/{name}": value for name, value in declip.dump(aux.extra).items()},
    }

    wanted = {
        name: value
        for name, value in golden.items()
        if name.startswith(("out/", "grad/", "buffer_after/"))
    }
    assert not set(wanted) - set(ours), "golden values that nothing here computes"
    gradient_norm = np.sqrt(
        sum(np.sum(value**2) for name, value in wanted.items() if name.startswith("grad/"))
    )
    wrong = []
    for name, value in wanted.items():
        norm = np.linalg.norm(value)
        error = np.linalg.norm(ours[name] - value)
        if name.startswith("grad/"):
            limit = 1e-4 * norm + 1e-6 * gradient_norm
        else:
            limit = 1e-5 * norm + 1e-6
        if ours[name].shape != value.shape or not error <= limit:
            wrong.append(f"{name}: error {error:.2e}, limit {limit:.2e}")
    assert not wrong, "\n".join(wrong)
