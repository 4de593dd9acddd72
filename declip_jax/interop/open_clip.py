"""open_clip's configuration files. Its names are OpenAI's, see `openai`."""

from collections.abc import Mapping
from typing import Any

from declip_jax.interop.architecture import sections

# Fields of a text tower: theirs, and the library's default. Ours are called the same but for one.
_TEXT = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12, proj_bias=False)
_OURS = {**{name: name for name in _TEXT}, "context_length": "context"}
# Fields of open_clip's configuration that we can compute with this value only, its default.
_OFF = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn")
_BLOCKS = {
    "mlp_ratio": 4.0,
    **dict.fromkeys(("ls_init_value", "act_kwargs", "norm_kwargs", "block_type")),
    **dict.fromkeys((*_OFF, "scale_fc", "final_ln_after_pool"), False),
}
_FIXED = {
    "": {},
    "vision_cfg": {
        **_BLOCKS,
        **dict.fromkeys(("attentional_pool", "no_ln_pre"), False),
        **dict(pos_embed_type="learnable", pool_type="tok", timm_model_name=None),
    },
    "text_cfg": {
        **_BLOCKS,
        **dict.fromkeys(("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")),
        **dict.fromkeys(("embed_cls", "no_causal_mask"), False),
        **dict(pool_type="argmax", proj_type="linear", hf_model_name=None),
    },
}
_FREE = {
    "": (
        *("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"),
        *("init_logit_scale", "init_logit_bias"),
    ),
    # Besides sizes: of training, of outputs we do not read, or of what is fixed to be off above.
    "vision_cfg": (
        *("image_size", "layers", "width", "patch_size", "head_width", "patch_dropout"),
        *("output_tokens", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained"),
        *("timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    ),
    "text_cfg": (
        *(*_TEXT, "output_tokens", "pad_id", "eos_id"),
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    ),
}


def to_config(
    model: Mapping[str, Any], mean, std, params: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """open_clip_config.json of a model, from the `model` section of a config and its parameters."""
    image, text = sections(model)
    bias = {"init_logit_bias": float(params["logit_bias"])} if "logit_bias" in params else {}
    return {
        "model_cfg": {
            "embed_dim": model["embed_dim"],
            "quick_gelu": model["activation"] == "quick_gelu",
            **bias,
            "vision_cfg": {
                "image_size": image.resolution,
                "layers": image.layers,
                "width": image.width,
                "patch_size": getattr(image, "patch", None),  # a null patch size is a ResNet's
                "head_width": image.token_width // image.heads,
            },
            "text_cfg": {theirs: getattr(text, ours) for theirs, ours in _OURS.items()},
        },
        "preprocess_cfg": {
            "size": image.resolution,
            "mode": "RGB",
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a config, as far as open_clip_config.json tells it.

    Raises ValueError: settings that our towers do not have, by name.
    """
    config = config.get("model_cfg", config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    for name, section in (("", config), ("vision_cfg", vision), ("text_cfg", text)):
        for field, value in section.items():
            told, usual = f"{name}.{field}={value!r}".lstrip("."), _FIXED[name].get(field, value)
            if value != usual:
                raise ValueError(f"{told} is another architecture, expected {usual!r}")
            if field not in _FIXED[name] and field not in _FREE[name]:
                raise ValueError(f"{told} is not known here")
    # What a file leaves out has the library's default.
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    is_resnet = isinstance(layers, list | tuple)
    size = vision.get("image_size")
    return {
        "embed_dim": config.get("embed_dim"),
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "image": {
            "resolution": size[0] if isinstance(size, list) else size,
            "width": width,
            "layers": layers,
            "heads": (32 * width if is_resnet else width) // vision.get("head_width", 64),
            **({} if is_resnet else {"patch": vision.get("patch_size", 16)}),
        },
        "text": {_OURS[name]: text.get(name, usual) for name, usual in _TEXT.items()},
    }


def preprocessing(
    config: Mapping[str, Any], resolution: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Mean, standard deviation and short side of open_clip_config.json, and what of it we do
    otherwise, in lines."""
    config, notes = config.get("preprocess_cfg", config) or {}, []
    size = config.get("size", resolution)
    if (size[0] if isinstance(size, list) else size) != resolution:
        notes.append(f"preprocess_cfg.size={size}: here it is the model's {resolution}")
    for name, ours in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if config.get(name, ours) != ours:
            notes.append(f"preprocess_cfg.{name}={config[name]!r}: here it is {ours!r}")
    told = {"mean": config.get("mean"), "std": config.get("std"), "short_side": resolution}
    return told, tuple(notes)
