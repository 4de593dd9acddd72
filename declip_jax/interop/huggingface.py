"""The layout of Transformers' CLIPModel, and the configuration beside its weights."""

from collections.abc import Mapping
from typing import Any

from declip_jax.interop.layers import array, linear, norm
from declip_jax.interop.tables import CONV, LINEAR, SAME, Entry, Layout


def _tower(ours: str, theirs: str) -> list[Entry]:
    blocks, layer = f"{ours}/blocks", f"{theirs}.encoder.layers.{{i}}"
    in_proj, qkv = f"{blocks}/attn/in_proj", [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
    return [
        array(f"{ours}/positional_embedding", f"{theirs}.embeddings.position_embedding.weight"),
        *norm(f"{blocks}/ln_1", f"{layer}.layer_norm1"),
        Entry(f"params/{in_proj}/kernel", tuple(f"{name}.weight" for name in qkv), LINEAR),
        Entry(f"params/{in_proj}/bias", tuple(f"{name}.bias" for name in qkv), SAME),
        *linear(f"{blocks}/attn/out_proj", f"{layer}.self_attn.out_proj"),
        *norm(f"{blocks}/ln_2", f"{layer}.layer_norm2"),
        *linear(f"{blocks}/mlp/c_fc", f"{layer}.mlp.fc1"),
        *linear(f"{blocks}/mlp/c_proj", f"{layer}.mlp.fc2"),
    ]


_IMAGE, _TEXT = "vision_model", "text_model"
LAYOUT = Layout(
    entries=(
        array("image/patch_embed/kernel", f"{_IMAGE}.embeddings.patch_embedding.weight", CONV),
        array("image/class_embedding", f"{_IMAGE}.embeddings.class_embedding"),
        *norm("image/ln_pre", f"{_IMAGE}.pre_layrnorm"),  # their spelling
        *_tower("image", _IMAGE),
        *norm("image/ln_post", f"{_IMAGE}.post_layernorm"),
        array("image/proj/kernel", "visual_projection.weight", LINEAR),
        array("text/token_embedding/embedding", f"{_TEXT}.embeddings.token_embedding.weight"),
        *_tower("text", _TEXT),
        *norm("text/ln_final", f"{_TEXT}.final_layer_norm"),
        array("text/proj/kernel", "text_projection.weight", LINEAR),
        array("logit_scale", "logit_scale"),
    ),
    ignored=(r".*\.position_ids",),  # a constant, in files of older versions
)

# Sizes of a tower, by their names in config.json: those of both, and each one's own.
_SIZES = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
_IMAGE_SIZES = {"image_size": "resolution", "patch_size": "patch"}
_TEXT_SIZES = {"vocab_size": "vocab_size", "max_position_embeddings": "context"}


def to_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model, from the `model` section of a config."""
    image, text = model["image"], model["text"]

    def tower(kind: str, sizes: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
        return {
            "hidden_size": sizes["width"],
            "intermediate_size": 4 * sizes["width"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "projection_dim": model["embed_dim"],
            "hidden_act": model["activation"],
            "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "model_type": kind,
            **{theirs: sizes[ours] for theirs, ours in own.items()},
        }

    end = text["eot_id"]  # the feature is read at the first of it
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "vision_config": tower("clip_vision_model", image, _IMAGE_SIZES) | {"num_channels": 3},
        "text_config": tower("clip_text_model", text, _TEXT_SIZES) | ids,
    }


def to_preprocessor_config(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: resize the short side, crop the square of the center, normalize."""
    size = preprocess["resolution"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess["short_side"]},
        "resample": 3,  # PIL's number for bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a config, as far as config.json tells it.

    Raises ValueError: settings that our towers do not have, by name.
    """
    if config.get("model_type", "clip") != "clip":
        raise ValueError(f"model_type={config['model_type']!r}, expected 'clip'")
    # What a file leaves out has the library's default.
    usual = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}
    image = usual | {"num_attention_heads": 12} | config.get("vision_config", {})
    text = usual | {"num_attention_heads": 8} | config.get("text_config", {})
    for name, section in (("vision_config", image), ("text_config", text)):
        if (epsilon := section["layer_norm_eps"]) != 1e-5:
            raise ValueError(f"{name}.layer_norm_eps={epsilon}, our LayerNorm has 1e-5")
    activation = image["hidden_act"]
    if activation != text["hidden_act"] or activation not in ("quick_gelu", "gelu"):
        raise ValueError(
            f"hidden_act is {activation!r} for images and {text['hidden_act']!r} for texts, "
            "expected 'quick_gelu' or 'gelu' for both"
        )
    # 2 stands for "the largest id of the text" in old files.
    eot_id = None if text["eos_token_id"] in (None, 2) else int(text["eos_token_id"])
    return {
        "embed_dim": config.get("projection_dim"),
        "activation": activation,
        "image": {ours: image.get(theirs) for theirs, ours in (_IMAGE_SIZES | _SIZES).items()},
        "text": {
            "eot_id": eot_id,
            **{ours: text.get(theirs) for theirs, ours in (_TEXT_SIZES | _SIZES).items()},
        },
    }


def preprocessing(
    config: Mapping[str, Any], resolution: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Mean, standard deviation and short side of preprocessor_config.json, and what of it we do
    otherwise, in lines."""
    size, notes = config.get("size", resolution), []
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        notes.append(
            f"size={dict(size)}: here the short side is resized, then the center is cropped"
        )
        size = resolution
    side = int(size["shortest_edge"] if isinstance(size, Mapping) else size)
    if side < resolution:
        notes.append(f"size={side} is below the crop: here it is the crop's {resolution}")
    crop = config.get("crop_size", resolution)
    crop = crop if isinstance(crop, int) else crop.get("height")
    if crop != resolution:
        notes.append(f"crop_size={crop}: here the crop is the model's {resolution}")
    if config.get("resample", 3) != 3:
        notes.append(f"resample={config['resample']}: here it is bicubic, 3")
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if config.get(name, True) is not True:
            notes.append(f"{name}={config[name]}: here it is done")
    told = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    return {**told, "short_side": max(side, resolution)}, tuple(notes)
