"""Sizes of the models in the literature, for the `model` section of a config."""

from typing import Any

from declip_jax.hints import did_you_mean


def _vit(patch: int, width: int, layers: int, heads: int, resolution: int = 224) -> dict[str, Any]:
    sizes = dict(patch=patch, width=width, layers=layers, heads=heads)
    return dict(kind="vit", resolution=resolution, **sizes)


def _resnet(width: int, layers: tuple[int, int, int, int], resolution: int = 224) -> dict[str, Any]:
    # 32 * width channels reach the attention pool, in heads of 64
    return dict(kind="resnet", resolution=resolution, width=width, layers=layers, heads=width // 2)


def _text(width: int, heads: int) -> dict[str, Any]:
    ids = dict(vocab_size=49409, eot_id=49407)  # OpenAI's 49,408 and the mask token
    return dict(**ids, context=77, width=width, layers=12, heads=heads, proj_bias=False)


# name: (embed_dim, image tower, text tower)
_VARIANTS = {
    "ViT-Ti/16": (384, _vit(16, 192, 12, 3), _text(384, 6)),
    "ViT-S/32": (384, _vit(32, 384, 12, 6), _text(384, 6)),
    "ViT-S/16": (384, _vit(16, 384, 12, 6), _text(384, 6)),
    "ViT-B/32": (512, _vit(32, 768, 12, 12), _text(512, 8)),
    "ViT-B/16": (512, _vit(16, 768, 12, 12), _text(512, 8)),
    "ViT-L/14": (768, _vit(14, 1024, 24, 16), _text(768, 12)),
    "ViT-L/14-336": (768, _vit(14, 1024, 24, 16, resolution=336), _text(768, 12)),
    "RN50": (1024, _resnet(64, (3, 4, 6, 3)), _text(512, 8)),
    "RN101": (512, _resnet(64, (3, 4, 23, 3)), _text(512, 8)),
    "RN50x4": (640, _resnet(80, (4, 6, 10, 6), resolution=288), _text(640, 10)),
    "RN50x16": (768, _resnet(96, (6, 8, 18, 8), resolution=384), _text(768, 12)),
}


def variant(name: str) -> dict[str, Any]:
    """Sizes of a named model: {"embed_dim": int, "image": dict, "text": dict}, the fields of the
    same names in a config's `model` section, complete but for the towers' options.

    Raises ValueError: unknown name; suggests the nearest.
    """
    if name not in _VARIANTS:
        hint = did_you_mean(name, _VARIANTS, cutoff=0)
        raise ValueError(f"unknown model {name!r}.{hint} Known: {', '.join(_VARIANTS)}")
    embed_dim, image, text = _VARIANTS[name]
    return dict(embed_dim=embed_dim, image=dict(image), text=dict(text))
