"""Models of others as ours: which layout a file has, what model it holds, and how it fits a run."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from declip_jax.interop import declip, huggingface, open_clip, openai, reading, tables
from declip_jax.models.two_towers import TwoTowers, two_towers

FORMATS = ("open_clip", "huggingface", "openai", "declip", "alip")
NOTES = "declip_jax.json"  # what `export` writes beside the weights

# Of formats whose program has no choice.
ACTIVATIONS = {"openai": "quick_gelu", "declip": "quick_gelu", "alip": "gelu"}

TOWERS = ("image", "text", "logit_scale")  # of a model's parameters; the rest are methods' heads


class Pretrained(NamedTuple):
    """A model that was read from a file.

    Attributes:
      source: where it comes from.
      format: one of FORMATS; "" if the names are those of OpenAI, open_clip and ALIP alike; or
        "declip_jax" of a run.
      method: that trained it: "clip" if nothing tells of another.
      layout: the table that it was read with; None of a run.
      variables: {"params": …, "batch_stats": …}, float32 numpy arrays: the towers whole, and heads.
      model: sizes and activation, the fields of a config's `model` section.
      unknown: those of them that the file does not tell, as "image.heads": `model` has what is
        usual, for the activation None.
      mean, std: of the channels, that images are normalised with; None if the file does not tell.
      short_side: pixels that images are resized to before the crop; likewise.
    """

    source: Path
    format: str
    method: str
    layout: tables.Layout | None
    variables: dict[str, Any]
    model: dict[str, Any]
    unknown: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    short_side: int | None = None

    def describe(self) -> str:
        """One line for the log."""
        image = self.model["image"]
        tower = f"ViT/{image['patch']}" if image["kind"] == "vit" else "ResNet"
        count = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        names = self.format or "OpenAI's, open_clip's and ALIP's (the same)"
        return (
            f"{self.source}: layout {names}, {self.method}, {tower} of {image['resolution']} px, "
            f"embedding {self.model['embed_dim']}, {count:,} parameters"
        )

    def digest(self) -> str:
        """Of all values and settings that features follow from."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(sorted(flatten_dict(self.model, sep=".").items())).encode())
        for path, leaf in sorted(flatten_dict(self.variables, sep="/").items()):
            digest.update(path.encode() + np.ascontiguousarray(leaf).data)
        return digest.hexdigest()


def read(path: str | Path, format: str = "") -> Pretrained:
    """Reads a model from a file or folder; see `reading.read` for which.

    Args:
      path: of the weights; JSON files of open_clip and Transformers beside them are heeded.
      format: one of FORMATS, where names do not tell it.

    Raises:
      ValueError: what cannot be read, is of no known layout, or is not complete.
    """
    weights = reading.read(Path(path))
    try:
        return of_arrays(weights.arrays, weights.configs, weights.path, format)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from error


def of_arrays(
    arrays: Mapping[str, np.ndarray],
    configs: Mapping[str, Mapping[str, Any]] = {},
    source: Path = Path(),
    format: str = "",
) -> Pretrained:
    """A state dict as a model; `read` without the reading."""
    arrays = _without_text_prefix(dict(arrays))
    notes = configs.get(NOTES, {})
    found, method, layout = _detect(arrays, configs, format or notes.get("format", ""))
    variables = tables.load(layout, arrays)
    model, unknown = _infer(variables, found), ["image.heads", "text.heads", "activation"]
    known: Mapping[str, Any] = {"activation": ACTIVATIONS.get(found)}
    if "model" in notes:
        known, method = notes["model"], notes["method"]
    elif found == "huggingface" and "config.json" in configs:
        known = huggingface.from_config(configs["config.json"])
    elif found == "open_clip" and "open_clip_config.json" in configs:
        known = open_clip.from_config(configs["open_clip_config.json"])
    elif format == "open_clip":
        known = {"activation": "gelu"}  # where its configuration says nothing else
    for name, value in flatten_dict(dict(known), sep=".").items():
        section, _, field = name.rpartition(".")
        if value is not None and name in (*unknown, "text.eot_id"):
            (model[section] if section else model)[field] = value
            unknown = [one for one in unknown if one != name]
    towers = {name: towers_of(tree) for name, tree in variables.items()}
    tables.check(layout, {k: v for k, v in towers.items() if v}, _like(model))
    mean, std, short_side = _preprocessing(configs, found, model["image"]["resolution"])
    return Pretrained(
        source, found, method, layout, variables, model, tuple(unknown), mean, std, short_side
    )


def fit(
    pretrained: Pretrained, fresh: Mapping[str, Any], model: Mapping[str, Any], resize: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """A pretrained model as the variables of a run.

    The towers and the logit scale are taken whole. A method's head is taken whole where both have
    it, and else stays as it starts.

    Args:
      pretrained: from `read`.
      fresh: {"params": …, "batch_stats": …} of the run, as it would start.
      model: the run's `config.model`.
      resize: interpolate the positions to the run's image size, cut or interpolate those of words
        to its context.

    Returns:
      A tree like `fresh` of numpy arrays, and what there is to tell about it, in lines.

    Raises:
      ValueError: another architecture, by field; arrays that are missing, unexpected or misshapen,
        all of them by name.
    """
    notes = []
    differences = _differences(pretrained, model, resize)
    if differences:
        raise ValueError(
            f"{pretrained.source} holds another model than the configuration describes:\n  "
            + "\n  ".join(differences)
        )
    if resize:
        pretrained, notes = resized(
            pretrained, model["image"]["resolution"], model["text"]["context"]
        )
    variables = pretrained.variables
    rows, wanted = pretrained.model["text"]["vocab_size"], model["text"]["vocab_size"]
    if rows < wanted:
        params = dict(variables["params"])
        more = np.asarray(fresh["params"]["text"]["token_embedding"]["embedding"])[rows:]
        old = params["text"]["token_embedding"]["embedding"]
        embedding = {"embedding": np.concatenate([old, more])}
        params["text"] = {**params["text"], "token_embedding": embedding}
        variables = {**variables, "params": params}
        notes.append(f"tokens {rows} … {wanted - 1} are not in it: new (the mask is such a token)")
    if pretrained.unknown:
        values = ", ".join(f"{n}={_get(model, n)!r}" for n in pretrained.unknown)
        notes.append(f"not told by the file, taken from the configuration: {values}")

    heads = {*fresh["params"]} - {*TOWERS}
    theirs = {*variables["params"]} - {*TOWERS}
    for names, what in ((heads - theirs, "not in it, start anew"), (theirs - heads, "left out")):
        if names:
            notes.append(f"{what}: {', '.join(sorted(names))}")
    shared = {*TOWERS, *(heads & theirs)}

    def part(tree: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
        parts = {kind: {n: tree[kind][n] for n in tree[kind] if n in names} for kind in tree}
        return {kind: leaves for kind, leaves in parts.items() if leaves}

    taken = part(variables, shared)
    tables.check(pretrained.layout, taken, part(fresh, shared))
    return {kind: {**fresh[kind], **taken.get(kind, {})} for kind in fresh}, notes


def resized(pretrained: Pretrained, resolution: int, context: int) -> tuple[Pretrained, list[str]]:
    """A model for another image size and another number of tokens.

    Positions of patches (or of a ResNet's cells) are interpolated as images are, cubic and
    anti-aliased. For fewer tokens the first positions stay, so that captions which fit keep their
    features; for more they are interpolated linearly. All but the cutting are open_clip's ways.

    Returns:
      The model, and what was done, in lines.

    Raises:
      ValueError: an image size that patches do not fill, or less than three tokens.
    """
    params, notes = dict(pretrained.variables["params"]), []
    image, text = pretrained.model["image"], pretrained.model["text"]
    step = image.get("patch", 32)
    if resolution < step or resolution % step:
        raise ValueError(f"an image size of {resolution} px is no multiple of {step}, a patch's.")
    if context < 3:
        raise ValueError(f"a context of {context} tokens leaves no room for a word: at least 3.")
    if resolution != image["resolution"]:
        before, after = image["resolution"] // step, resolution // step
        path = () if image["kind"] == "vit" else ("attnpool",)

        def replace(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
            if path:
                return {**tree, path[0]: replace(tree[path[0]], path[1:])}
            first, grid = np.split(
                tree["positional_embedding"], [1]
            )  # of the class token, the mean
            grid = grid.reshape(before, before, -1)  # [g * g, w] -> [g, g, w]
            grid = jax.image.resize(grid, (after, after, grid.shape[-1]), "cubic")
            grid = np.asarray(grid).reshape(after * after, -1)  # [G, G, w] -> [G * G, w]
            return {**tree, "positional_embedding": np.concatenate([first, grid])}

        params["image"] = replace(params["image"], path)
        notes.append(
            f"positions of {before}×{before} patches were interpolated to {after}×{after}, for "
            f"{resolution} px"
        )
    if context != text["context"]:
        positions = params["text"]["positional_embedding"]
        if context < text["context"]:
            positions = positions[:context]
            notes.append(f"positions of {text['context']} tokens were cut to {context}")
        else:
            shape = (context, positions.shape[1])
            positions = np.asarray(jax.image.resize(positions, shape, "linear", antialias=False))
            notes.append(f"positions of {text['context']} tokens were interpolated to {context}")
        params["text"] = {**params["text"], "positional_embedding": positions}
    side = pretrained.short_side
    return pretrained._replace(
        variables={**pretrained.variables, "params": params},
        model={
            **pretrained.model,
            "image": {**image, "resolution": resolution},
            "text": {**text, "context": context},
        },
        short_side=side and round(side * resolution / image["resolution"]),
    ), notes


def layout_of(
    format: str, kind: str, method: str = "clip", proj_bias: bool = False
) -> tables.Layout:
    """The table of a format, for an image tower of a kind and a model trained by `method`."""
    if format == "huggingface":
        return huggingface.LAYOUT
    if format == "declip":
        return declip.layout(kind, method)
    return openai.layout(kind, proj_bias and format == "open_clip")


def _without_text_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # open_clip's models with "custom_text" have the text tower's arrays a level deeper.
    if "text.token_embedding.weight" in arrays:
        return {name.removeprefix("text."): array for name, array in arrays.items()}
    return arrays


def _detect(
    names: Mapping[str, Any], configs: Mapping[str, Any], format: str
) -> tuple[str, str, tables.Layout]:
    """Format, method and layout. Raises ValueError if none fits, or not the one that was asked."""
    tops = {name.split(".")[0] for name in names}
    same_names = ("openai", "open_clip", "alip")
    if {"vision_model", "text_model"} <= tops:
        found, method = "huggingface", "clip"
    elif "visual" in tops and {"encode_text", "text_encoder"} & tops:
        found = "declip"
        if "text_encoder" in tops:
            method = "slip"
        elif "projector" in tops:
            method = "defilip" if "image_mapping" in tops else "declip"
        else:
            method = "filip" if "image_mapping" in tops else "clip"
    elif "visual" in tops and {"token_embedding", "transformer", "ln_final"} & tops:
        method = "clip"
        if format in same_names:
            found = format
        elif "open_clip_config.json" in configs:
            found = "open_clip"
        elif {*openai.SIZES} <= {*names}:
            found = "openai"
        else:  # a linear layer is open_clip's alone
            found = "open_clip" if "text_projection.weight" in names else ""
        method = "alip" if found == "alip" else "clip"
    else:
        first = ", ".join(sorted(names)[:5])
        raise ValueError(
            f"no CLIP model of a known layout ({', '.join(FORMATS)}): its {len(names)} arrays are "
            f"called {first}, …"
        )
    if format and format != found:
        raise ValueError(f"the names are those of {found or same_names}, not of {format!r}")
    kind = "resnet" if any(name.startswith("visual.attnpool.") for name in names) else "vit"
    return found, method, layout_of(found, kind, method, "text_projection.weight" in names)


def _infer(variables: Mapping[str, Any], format: str) -> dict[str, Any]:
    """The `model` section of a config, from the shapes of our variables."""
    shapes = {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}

    def shape(path: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(path, ())) != rank:
            raise ValueError(f"the array that is {path} here is missing or has another shape")
        return shapes[path]

    def side(path: str) -> int:
        cells = shape(path, 2)[0] - 1
        if math.isqrt(cells) ** 2 != cells:
            raise ValueError(f"{cells} positions of patches are no square")
        return math.isqrt(cells)

    if "image/conv3/kernel" in shapes:
        width = shape("image/conv3/kernel", 4)[3]
        stages = [
            {p for p in variables["params"]["image"] if p.startswith(f"layer{n}_")}
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


def _like(model: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the towers' variables."""
    how = dict(dtype="float32", scan=True, remat="none", attention="xla", heads={})
    activation = model["activation"] or "gelu"  # either has the same variables
    towers = two_towers(ConfigDict({**model, **how, "activation": activation}))
    size, context = model["image"]["resolution"], model["text"]["context"]

    def run(towers: TwoTowers, images, tokens):
        return towers.encode_image(images), towers.encode_text(tokens)

    images = jnp.zeros((1, 1, size, size, 3))
    tokens = jnp.zeros((1, 1, context), jnp.int32)
    return jax.eval_shape(lambda: dict(towers.init(jax.random.key(0), images, tokens, method=run)))


def towers_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaves for name, leaves in tree.items() if name in TOWERS}


def _preprocessing(configs: Mapping[str, Any], format: str, resolution: int):
    """(mean, std, short side), None for what is not told."""
    if NOTES in configs and "preprocess" in configs[NOTES]:
        told = configs[NOTES]["preprocess"]
        return tuple(told["mean"]), tuple(told["std"]), told["short_side"]
    if format == "open_clip" and "preprocess_cfg" in configs.get("open_clip_config.json", {}):
        told = configs["open_clip_config.json"]["preprocess_cfg"]
        if "mean" in told and "std" in told:
            return tuple(told["mean"]), tuple(told["std"]), resolution
    if format == "huggingface" and "preprocessor_config.json" in configs:
        told = configs["preprocessor_config.json"]
        size = told.get("size", resolution)
        side = size.get("shortest_edge", resolution) if isinstance(size, dict) else size
        if "image_mean" in told and "image_std" in told:
            return tuple(told["image_mean"]), tuple(told["image_std"]), side
    return None, None, None


def _get(model: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        model = model[part]
    return model


def _differences(pretrained: Pretrained, model: Mapping[str, Any], resize: bool) -> list[str]:
    """Lines "field: in the file, in the configuration" of what makes another model."""
    lines = []
    for name, value in flatten_dict(pretrained.model, sep=".").items():
        section, _, field = name.rpartition(".")
        ours = model[section] if section else model
        own = ours.get(field, "absent")
        if name in pretrained.unknown or field == "bn_group_size":
            continue
        own = tuple(own) if isinstance(own, (list, tuple)) else own
        if own == value or (name == "text.vocab_size" and own > value):
            continue
        if name in ("image.resolution", "text.context"):
            if resize:
                continue
            hint = f"set config.model.{name}={value}, or config.init_resize=True"
        else:
            hint = f"set config.model.{name}={value}"
        lines.append(f"model.{name}: {value!r} in it, {own!r} in the configuration: {hint}")
    return lines
