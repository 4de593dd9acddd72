"""What model variables of ours belong to, and what variables a model has."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from declip_jax.models.text import Text
from declip_jax.models.tower import ImageTower, Shapes
from declip_jax.models.two_towers import IMAGE_TOWERS, TwoTowers, read_image, two_towers

TOWERS = ("image", "text", "logit_scale")  # of a model's parameters; the rest are methods' heads


def infer(variables: Mapping[str, Any], format: str) -> dict[str, Any]:
    """The sizes of a config's `model` section, from the shapes of our variables.

    The activation, which no shape tells, is None.

    Raises ValueError: variables without which there are no sizes.
    """
    params = flatten_dict(variables["params"], sep="/")
    shapes = Shapes({path: leaf.shape for path, leaf in params.items()})
    towers = {f"image/{tower.first_layer}/kernel": tower for tower in IMAGE_TOWERS.values()}
    image = next((tower for path, tower in towers.items() if path in shapes), None)
    if image is None:
        raise ValueError(f"no array is {' or '.join(towers)} here")
    text = Text.recognize(shapes).as_dict()
    if format == "declip":  # its mask comes after the end
        text["eot_id"] = min(text["eot_id"], text["vocab_size"] - 2)
    embed_dim = shapes.of("text/proj/kernel", 2)[1]
    image = image.recognize(shapes).as_dict()
    return dict(embed_dim=embed_dim, activation=None, image=image, text=text)


def sections(model: Mapping[str, Any]) -> tuple[ImageTower, Text]:
    """The towers of a config's `model` section, their options completed."""
    where = "config.model"
    return read_image(model["image"], f"{where}.image"), Text.read(model["text"], f"{where}.text")


def config_of(model: Mapping[str, Any]) -> ConfigDict:
    """The `model` section of a config, from sizes and activation: to compute in float32."""
    how = dict(dtype="float32", scan=True, remat="none", attention="xla", heads=None)
    return ConfigDict({**model, **how})


def towers_like(model: Mapping[str, Any]) -> dict[str, Any]:
    """ShapeDtypeStructs of the variables of a model's towers, whatever the activation."""
    network = two_towers(config_of({**model, "activation": "gelu"}))
    size, context = model["image"]["resolution"], model["text"]["context"]

    def run(network: TwoTowers, images, tokens):
        return network.encode_image(images), network.encode_text(tokens)

    images = jnp.zeros((1, 1, size, size, 3))
    tokens = jnp.zeros((1, 1, context), jnp.int32)
    return jax.eval_shape(lambda: dict(network.init(jax.random.key(0), images, tokens, method=run)))


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
        normalizes = re.search(r"/bn\d+$", layer)
        names = ("scale", "bias") if normalizes else ("kernel", "bias")
        wanted |= {f"params/{layer}/{name}" for name in names}
        if normalizes:
            wanted |= {f"batch_stats/{layer}/{name}" for name in ("mean", "var")}
    return sorted(wanted - paths)
