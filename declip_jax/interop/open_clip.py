"""open_clip's configuration files. Its names are OpenAI's, see `openai`."""

from collections.abc import Mapping
from typing import Any

# Fields of open_clip's configuration that we can compute with this value only, its default.
_BLOCKS = {
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "final_ln_after_pool": False,
}
_FIXED = {
    "vision_cfg": {
        **_BLOCKS,
        "attentional_pool": False,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "timm_model_name": None,
    },
    "text_cfg": {
        **_BLOCKS,
        "hf_tokenizer_name": None,
        "embed_cls": False,
        "no_causal_mask": False,
        "pool_type": "argmax",
        "proj_type": "linear",
        "hf_model_name": None,
    },
}
_FREE = {
    "vision_cfg": (
        *("image_size", "layers", "width", "patch_size", "head_width"),
        # of training, of outputs we do not read, or of what is fixed to be off above
        *("patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"),
        *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias"),
        *("timm_drop", "timm_drop_path"),
    ),
    "text_cfg": (
        *("context_length", "vocab_size", "width", "heads", "layers", "proj_bias"),
        *("output_tokens", "pad_id", "eos_id", "tokenizer_mode", "tokenizer_kwargs"),
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    ),
    "": ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale"),
}


def to_config(model: Mapping[str, Any], mean, std) -> dict[str, Any]:
    """open_clip_config.json of a model, from the `model` section of a config."""
    image, text = model["image"], model["text"]
    channels = image["width"] if image["kind"] == "vit" else 32 * image["width"]
    vision = {
        "image_size": image["resolution"],
        "layers": image["layers"] if image["kind"] == "vit" else list(image["layers"]),
        "width": image["width"],
        # A null patch size is a ResNet's.
        "patch_size": image["patch"] if image["kind"] == "vit" else None,
        "head_width": channels // image["heads"],
    }
    return {
        "model_cfg": {
            "embed_dim": model["embed_dim"],
            "quick_gelu": model["activation"] == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": text["context"],
                "vocab_size": text["vocab_size"],
                "width": text["width"],
                "heads": text["heads"],
                "layers": text["layers"],
                "proj_bias": text["proj_bias"],
            },
        },
        "preprocess_cfg": {
            "size": image["resolution"],
            "mode": "RGB",
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip_config.json tells that the weights do not: activation and heads.

    Raises:
      ValueError: settings that our towers do not have, by name.
    """
    config = config.get("model_cfg", config)
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    for name, section in (("", config), ("vision_cfg", vision), ("text_cfg", text)):
        fixed = _FIXED.get(name, {})
        for field, value in section.items():
            path = f"{name}.{field}".lstrip(".")
            if field in fixed and value != fixed[field]:
                raise ValueError(
                    f"open_clip_config.json: {path}={value!r} is another architecture, expected "
                    f"{fixed[field]!r}"
                )
            if field not in fixed and field not in _FREE[name]:
                raise ValueError(f"open_clip_config.json: {path}={value!r} is not known here")
    channels = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
    return {
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "image": {"heads": channels // vision.get("head_width", 64)},
        "text": {"heads": text.get("heads", 8)},
    }
