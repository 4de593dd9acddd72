"""What model variables of ours belong to, and what variables a model has."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from declip_jax.models.two_towers import TwoTowers, two_towers

TOWERS = ("image", "text", "logit_scale")  # of a model's parameters; the rest are methods' heads


def infer(variables: Mapping[str, Any], format: str) -> dict[str, Any]:
    """The sizes of a config's `model` section, from the shapes of our variables.

    The number of heads is no shape: it is one for each 64 channels, as usual. The activation is
    None.

    Raises:
      ValueError: variables without which there are no sizes.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}

    def shape(path: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(path, ())) != rank or 0 in shapes[path]:
            raise ValueError(f"the array that is {path} here is missing or has another shape")
        return shapes[path]

    def side(path: str) -> int:
        cells = shape(path, 2)[0] - 1
        if cells < 1 or math.isqrt(cells) ** 2 != cells:
            raise ValueError(f"{path} has {cells} positions of patches, expected a square")
        return math.isqrt(cells)

    if "image/conv3/kernel" in shapes:
        width = shape("image/conv3/kernel", 4)[3]
        stages = [
            {name for name in variables["params"]["image"] if name.startswith(f"layer{n}_")}
            for n in (1, 2, 3, 4)
        ]
        image = dict(
            kind="resnet",
            resolution=32 * side("image/attnpool/positional_embedding"),
            width=width,
            layers=tuple(map(len, stages)),
            heads=max(1, 32 * width // 64),
            bn_group_size=0,
        )
        embed_dim = shape("image/attnpool/c_proj/kernel", 2)[1]
    else:
        patch, _, _, width = shape("image/patch_embed/kernel", 4)
        image = dict(
            kind="vit",
            resolution=patch * side("image/positional_embedding"),
            patch=patch,
            width=width,
            layers=shape("image/blocks/ln_1/scale", 2)[0],
            heads=max(1, width // 64),
        )
        embed_dim = shape("image/proj/kernel", 2)[1]
    vocab_size, width = shape("text/token_embedding/embedding", 2)
    text = dict(
        vocab_size=vocab_size,
        # OpenAI's id; of a small vocabulary the last, but for DeCLIP's mask.
        eot_id=min(49407, vocab_size - (2 if format == "declip" else 1)),
        context=shape("text/positional_embedding", 2)[0],
        width=width,
        layers=shape("text/blocks/ln_1/scale", 2)[0],
        heads=max(1, width // 64),
        proj_bias="text/proj/bias" in shapes,
    )
    return dict(embed_dim=embed_dim, activation=None, image=image, text=text)


def config_of(model: Mapping[str, Any]) -> ConfigDict:
    """The `model` section of a config, from sizes and activation: to compute in float32."""
    how = dict(dtype="float32", scan=True, remat="none", attention="xla", heads={})
    return ConfigDict({**model, **how})


def towers_like(model: Mapping[str, Any]) -> dict[str, Any]:
    """ShapeDtypeStructs of the variables of a model's towers, whatever the activation."""
    towers = two_towers(config_of({**model, "activation": "gelu"}))
    size, context = model["image"]["resolution"], model["text"]["context"]

    def run(towers: TwoTowers, images, tokens):
        return towers.encode_image(images), towers.encode_text(tokens)

    images = jnp.zeros((1, 1, size, size, 3))
    tokens = jnp.zeros((1, 1, context), jnp.int32)
    return jax.eval_shape(lambda: dict(towers.init(jax.random.key(0), images, tokens, method=run)))


def towers_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables without those of methods' heads."""
    return part_of(variables, TOWERS)


def part_of(variables: Mapping[str, Any], names) -> dict[str, Any]:
    """Of variables' parts, those with these names; kinds of variables without any are left out."""
    parts = {kind: {n: tree[n] for n in tree if n in names} for kind, tree in variables.items()}
    return {kind: tree for kind, tree in parts.items() if tree}


def missing_of_heads(variables: Mapping[str, Any]) -> list[str]:
    """Paths that a head lacks: parts of its layers, and layers before its last."""
    paths = {p for p in flatten_dict(variables, sep="/") if p.split("/")[1] not in TOWERS}
    # "params/projector/linear1/kernel" -> "projector/linear1"; "params/logit_scale_dense" -> ""
    layers = {path.split("/", 1)[1].rpartition("/")[0] for path in paths} - {""}
    for layer in list(layers):
        if found := re.fullmatch(r"(.*/linear)(\d+)", layer):
            layers |= {f"{found[1]}{n}" for n in range(1, int(found[2]))}
    wanted = set()
    for layer in layers:
        if re.search(r"/bn\d+$", layer):
            wanted |= {f"params/{layer}/{name}" for name in ("scale", "bias")}
            wanted |= {f"batch_stats/{layer}/{name}" for name in ("mean", "var")}
        else:
            wanted |= {f"params/{layer}/{name}" for name in ("kernel", "bias")}
    return sorted(wanted - paths)
