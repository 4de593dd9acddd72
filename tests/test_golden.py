"""Training steps in float32 against values computed once by the published PyTorch code.

It computed those of the vision transformers in float32, those of the ResNets in float64, of inputs
for which no ReLU lies so near to zero that rounding decides which way it goes.

A file tests/golden/NAME.npz (GOLDEN_DIR names another folder) holds inputs `in/*`, weights
`param/*`, and what the published code made of them: `out/*`, `grad/*` and, of batch normalization,
`buffer_after/*`. `meta` is JSON: the method, its sizes and its token ids. ALIP's has three steps
with the same weights, `step0/in/*` and so on, whose running means move.
"""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import common
from declip_jax import support_set
from declip_jax.interop import declip, pretrained, tables
from declip_jax.interop.transfer import fit
from declip_jax.losses import adaptive
from declip_jax.losses.contrastive import normalize, similarity
from declip_jax.losses.late_interaction import late_interaction
from declip_jax.parallel.mesh import make_mesh
from tests.drawn import method_of

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
assert FILES, f"no golden files in {FOLDER}"
MESH = make_mesh(1, 1, jax.devices()[:1])


def config_of(meta):
    method = meta["method"]
    config = common.get_config().unlock()
    config.method = method
    config.batch_size = meta["batch"]
    config.model.dtype = "float32"
    config.model.embed_dim = meta["embed_dim"]
    config.model.image = dict(kind="vit", **meta["image"])
    if meta.get("tower") == "rn":
        config.model.image.update(kind="resnet", bn_group_size=0)
    if method == "alip":
        config.model.activation = meta["activation"]
        text = meta["text"]
        config.model.text = dict(
            {name: text[name] for name in ("vocab_size", "eot_id", "width", "layers", "heads")},
            context=text["context_length"],
            proj_bias=False,
        )
        config.loss.weights = {"raw": 1.0, "synthetic": 1.0}
        config.loss.adaptive = dict(momentum=meta["momentum"], gamma=meta["gamma"])
        return config.lock()
    config.model.text = dict(
        vocab_size=meta["vocab_size"],
        eot_id=int(declip.tokens_from_theirs(np.array(meta["eot_id"]), meta["vocab_size"])),
        context=meta["context_length"],
        width=meta["text_width"],
        layers=meta["text_layers"],
        heads=meta["text_heads"],
        proj_bias=True,
    )
    hidden = meta["head_hidden"]
    config.model.heads.update(projector=hidden, predictor=hidden // 2, simclr_hidden=hidden)
    config.model.heads.simclr = meta.get("sim_dim", 1)
    config.model.heads.dense = meta.get("dense_embed_dim", 1)
    config.loss.support_set.size = meta.get("nn_size", 64)
    config.loss.late_interaction.tokens = meta.get("filip_top_k", 16)
    config.loss.temperature = meta.get("temperature", 0.1)
    default = {"clip": {"clip": 1.0}, "filip": {"clip": 0.0, "filip": 1.0}}
    config.loss.weights = meta["weights"] if "weights" in meta else default[method]
    return config.lock()


def batch_of(meta, golden):
    """The inputs as a batch of ours."""

    def pixels(*names):  # [B, 3, H, W] each -> [B, V, H, W, 3]
        return np.stack([golden[f"in/{name}"].transpose(0, 2, 3, 1) for name in names], axis=1)

    def tokens(*names):  # [B, L] each -> [B, T, L]
        ids = np.stack([golden[f"in/{name}"] for name in names], axis=1)
        if meta["method"] == "alip":
            return ids.astype(np.int32)
        return declip.tokens_from_theirs(ids, meta["vocab_size"])

    images, texts = {
        "clip": (["image"], ["tokens"]),
        "slip": (["image", "image_1", "image_2"], ["tokens"]),
        "filip": (["image"], ["tokens_masked"]),
        "declip": (["image_1", "image_2"], ["tokens_masked", "tokens_aug"]),
        "defilip": (["image_1", "image_2"], ["tokens_masked", "tokens_aug"]),
        "alip": (["image"], ["tokens_raw", "tokens_caption"]),
    }[meta["method"]]
    batch = {"image": pixels(*images), "tokens": tokens(*texts)}
    if "in/mlm_labels" in golden:
        labels = golden["in/mlm_labels"]
        ours = declip.tokens_from_theirs(np.maximum(labels, 0), meta["vocab_size"])
        batch["mlm_labels"] = np.where(labels >= 0, ours, -1).astype(np.int32)
    return batch


def keep_features(features):
    """While open, what the towers and SLIP's head give is kept in `features`, under their names."""

    def keep(call, args, kwargs, context):
        given = call(*args, **kwargs)
        if context.method_name in ("encode_image", "encode_text"):
            features[context.method_name] = given
        elif (context.module.name, context.method_name) == ("simclr", "__call__"):
            features["simclr"] = given
        return given

    return nn.intercept_methods(keep)


def outputs_of(config, variables, metrics, model_state, features):
    """Everything that a file of this method may hold as `out/*`."""
    params, terms = variables["params"], {"loss": metrics["loss"]}
    image, text = features["encode_image"], features["encode_text"]
    images, texts = normalize(image.embedding), normalize(text.embedding)
    v1, t = images[:, 0], texts[:, 0]
    scale = jnp.exp(params["logit_scale"])
    method = config.method
    if method == "clip":
        terms["logits_per_image"] = similarity(v1, t, scale)
        terms["logits_per_text"] = similarity(t, v1, scale)
    if method == "slip":
        terms |= {f"sim_{view + 1}": features["simclr"][:, view] for view in (0, 1)}
        terms |= {name: metrics[name] for name in ("clip", "simclr")}
    if method in ("filip", "defilip"):
        mapped = {
            name: normalize(features @ params[name]["kernel"] + params[name]["bias"])
            for name, features in (
                ("image_mapping", image.tokens[:, 0]),
                ("text_mapping", text.words[:, 0]),
            )
        }
        logits = late_interaction(
            *mapped.values(), tokens=config.loss.late_interaction.tokens, mesh=MESH, block=64
        )
        names = ("image", "text")
        prefix = "dense" if method == "filip" else "filip"
        for name, similarities in zip(names, logits, strict=True):
            terms[f"{prefix}_logits_{name}"] = jnp.exp(params["logit_scale_dense"]) * similarities
        terms[prefix] = metrics["filip"]
    if method in ("declip", "defilip"):
        terms |= {name: metrics[name] for name in ("clip", "simsiam", "nn_text", "mlm")}
        terms |= {"text_features": t, "image_features_1": v1, "image_features_2": images[:, 1]}
        for name, queries in (("nn_logits_1", t), ("nn_logits_1_aug", texts[:, 1])):
            found = support_set.nearest(variables["support_set"], queries, mesh=MESH, block=16)
            terms[name] = similarity(v1, found.rows[:, 0], scale)
        terms["bank_after"] = model_state["support_set"]["rows"].T
        terms["bank_ptr_after"] = model_state["support_set"]["pointer"][None]
    if method == "alip":
        gates, means = adaptive.gates(
            v1, t, texts[:, 1], variables["running_means"], **config.loss.adaptive
        )
        terms |= {"loss_raw": metrics["raw"], "loss_caption": metrics["synthetic"]}
        terms |= {"weight_sample": gates.sample, "weight_raw": gates.raw}
        terms |= {"weight_caption": gates.synthetic, "image_features": v1}
        terms |= {"text_features_raw": t, "text_features_caption": texts[:, 1]}
        theirs = {"text": "momentum_text", "raw": "momentum_raw", "synthetic": "momentum_caption"}
        terms |= {theirs[name]: mean for name, mean in means.items()}
        assert jax.tree.structure(means) == jax.tree.structure(model_state["running_means"])
    return terms


def compare(ours, golden, unused):
    """Raises AssertionError with every value that is off.

    Args:
      unused: patterns of published names that nothing reads.
    """
    wanted = {
        name: value
        for name, value in golden.items()
        if name.startswith(("out/", "grad/", "buffer_after/"))
        and not any(re.fullmatch(f"buffer_after/{pattern}", name) for pattern in unused)
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden(file):
    golden = dict(np.load(file, allow_pickle=False))
    meta = json.loads(golden.pop("meta").tobytes())
    config = config_of(meta)
    method = method_of(config, MESH)
    assert set(meta.get("weights", config.loss.weights)) == set(config.loss.weights)

    state_dict = {
        name.removeprefix("param/"): value
        for name, value in golden.items()
        if name.startswith("param/")
    }
    read = pretrained.of_arrays(state_dict)
    assert meta["method"] in (read.method, "alip")  # ALIP's names are OpenAI's
    like = jax.eval_shape(method.init, jax.random.key(0))
    like = {"params": like[0], **{n: like[1][n] for n in like[1] if n == "batch_stats"}}
    variables, _ = fit(read, like, config.model)
    assert jax.tree.structure(variables) == jax.tree.structure(like)  # no head is missing

    if meta["method"] == "alip":
        variables["running_means"] = adaptive.initial_means()

    def dump(tree):
        return tables.dump(read.layout, tree)

    if "in/bank" in golden:
        rows, zero = golden["in/bank"].T, np.zeros((), np.int32)
        variables["support_set"] = {"rows": rows, "pointer": zero, "filled": zero}

    @jax.jit
    def step(variables, batch):
        model_state = {name: value for name, value in variables.items() if name != "params"}

        def loss(params):
            features = {}
            with keep_features(features):
                loss, aux = method.loss(params, model_state, batch, jax.random.key(0))
            return loss, (aux, features)

        (loss, (aux, features)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        outputs = outputs_of(config, variables, aux.metrics, aux.model_state, features)
        return loss, aux, grads, outputs

    steps = sorted({name.split("/")[0] for name in golden if name.startswith("step")})
    for prefix in [f"{name}/" for name in steps] or [""]:
        here = {name.removeprefix(prefix): golden[name] for name in golden if prefix in name}
        loss, aux, grads, outputs = step(variables, batch_of(meta, here))
        assert loss == aux.metrics["loss"]
        assert int(aux.metrics.get("mlm_dropped", 0)) == 0
        compare(
            {
                **{f"out/{name}": value for name, value in outputs.items()},
                **{f"grad/{name}": value for name, value in dump({"params": grads}).items()},
                **{
                    f"buffer_after/{name}": value
                    for name, value in dump(
                        {n: aux.model_state[n] for n in aux.model_state if n == "batch_stats"}
                    ).items()
                },
            },
            here,
            unused=read.layout.ignored,
        )
        variables = {"params": variables["params"], **aux.model_state}
