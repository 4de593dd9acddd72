"""Exported models in the hands of the library that they are for."""

import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from declip_jax.interop import open_clip, openai, pretrained, reading
from declip_jax.interop.architecture import TOWERS, config_of, part_of
from declip_jax.interop.pretrained import Pretrained
from declip_jax.models.two_towers import TwoTowers, two_towers

# What computes each format, and how to get it. DeCLIP's program is no package.
# Of OpenAI's and ALIP's, names and computation are open_clip's.
LIBRARIES = dict.fromkeys(("open_clip", "openai", "alip"), "open_clip_torch")
LIBRARIES["huggingface"] = "transformers"


class Features(NamedTuple):
    """What a model makes of N images and M texts: unit rows [N, D], [M, D], and logits [N, M]."""

    image: np.ndarray
    text: np.ndarray
    logits: np.ndarray


class NotInstalled(Exception):
    """The library is not there; the message says how to get it."""


def embeddings(
    model: Pretrained, pixels: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, D] and [M, D] by our towers, in float32, not normalized.

    The pixels are normalized, float32 [N, H, W, 3], the tokens int32 [M, L].
    """
    network, variables = two_towers(config_of(model.model)), part_of(model.variables, TOWERS)

    @jax.jit
    def encode(variables, pixels, tokens):
        image = network.apply(variables, pixels[:, None], method=TwoTowers.encode_image)
        text = network.apply(variables, tokens[:, None], method=TwoTowers.encode_text)
        return image.embedding[:, 0], text.embedding[:, 0]

    with jax.default_matmul_precision("highest"):
        image, text = encode(variables, jnp.asarray(pixels), jnp.asarray(tokens))
    return np.asarray(image), np.asarray(text)


def ours(model: Pretrained, pixels: np.ndarray, tokens: np.ndarray) -> Features:
    """Features by our towers; arguments as for `embeddings`."""
    params = model.variables["params"]
    bias = params.get("logit_bias", 0.0)
    return _features(*embeddings(model, pixels, tokens), params["logit_scale"], bias)


def theirs(folder: Path, format: str, pixels: np.ndarray, tokens: np.ndarray) -> Features:
    """Features by the library that a folder was exported for; arguments as for `embeddings`.

    Raises NotInstalled: it is not.
    """
    try:
        import torch

        if format == "huggingface":
            from transformers import CLIPModel
        else:
            import open_clip as library
    except (ImportError, RuntimeError) as error:  # torchvision of another torch: RuntimeError
        raise NotInstalled(
            f"{LIBRARIES[format]} cannot be imported ({str(error).splitlines()[0]}): pip install "
            "'declip-jax[torch]'"
        ) from error
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))  # NHWC -> NCHW
    texts = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        if format == "huggingface":
            network = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            out = network(input_ids=texts, pixel_values=images)
            features = out.image_embeds, out.text_embeds
        else:
            if format == "open_clip":
                network, _, _ = library.create_model_and_transforms(f"local-dir:{folder}")
            else:
                network = _build_open_clip(library, torch, folder)
            network.eval()
            features = network.encode_image(images), network.encode_text(texts)
        bias = getattr(network, "logit_bias", None)
        found = *features, network.logit_scale, torch.zeros(()) if bias is None else bias
    return _features(*(x.detach().float().numpy() for x in found))


def version(format: str) -> str:
    """Name and version of the library."""
    name = LIBRARIES[format]
    return f"{name} {importlib.metadata.version(name)}"


def differences(one: Features, other: Features) -> dict[str, float]:
    """The largest difference of each kind; of logits as a share of the largest."""
    largest = (float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
    found = dict(zip(Features._fields, largest, strict=True))
    found["logits"] /= float(np.abs(one.logits).max())
    return found


def same_arrays(folder: Path, model: Pretrained) -> bool:
    """Whether a folder, read again, holds the same arrays as the model bit for bit."""
    again, before = map(flatten_dict, (pretrained.read(folder).variables, model.variables))
    return again.keys() == before.keys() and all(
        np.array_equal(a.view(np.uint32), np.asarray(before[path]).view(np.uint32))
        for path, a in again.items()
    )


def _build_open_clip(library: Any, torch: Any, folder: Path) -> Any:
    """open_clip's network for names without a configuration of open_clip's."""
    weights = reading.read(folder)
    config = open_clip.to_config(weights.configs[pretrained.NOTES]["model"], mean=(), std=())
    network = library.CLIP(**config["model_cfg"])
    tensors = {name: torch.from_numpy(array) for name, array in weights.arrays.items()}
    network.load_state_dict({n: t for n, t in tensors.items() if n not in openai.SIZES})
    return network


def _features(image, text, logit_scale, logit_bias) -> Features:
    image, text = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    return Features(image, text, np.exp(np.asarray(logit_scale)) * image @ text.T + logit_bias)
