"""Exported models in the hands of the library that they are for."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from declip_jax.interop import open_clip, openai, pretrained
from declip_jax.interop.architecture import config_of, towers_of
from declip_jax.interop.pretrained import Pretrained
from declip_jax.models.two_towers import TwoTowers, two_towers

# What computes each format, and how to get it. DeCLIP's program is no package.
LIBRARIES = {
    "open_clip": "open_clip_torch",
    "openai": "open_clip_torch",  # names and computation are the same
    "alip": "open_clip_torch",
    "huggingface": "transformers",
}


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

    Args:
      model: with a known activation.
      pixels: float32 [N, H, W, 3], normalized.
      tokens: int32 [M, L].
    """
    network, variables = two_towers(config_of(model.model)), towers_of(model.variables)

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

    Raises:
      NotInstalled: it is not.
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
    found = {
        name: float(np.abs(a - b).max())
        for name, a, b in zip(Features._fields, one, other, strict=True)
    }
    found["logits"] /= float(np.abs(one.logits).max())
    return found


def same_arrays(folder: Path, model: Pretrained) -> bool:
    """Whether a folder, read again, holds the same arrays as the model bit for bit."""
    again = jax.tree_util.tree_leaves_with_path(pretrained.read(folder).variables)
    before = jax.tree_util.tree_leaves_with_path(model.variables)
    return [path for path, _ in again] == [path for path, _ in before] and all(
        np.array_equal(a.view(np.uint32), np.asarray(b).view(np.uint32))
        for (_, a), (_, b) in zip(again, before, strict=True)
    )


def _build_open_clip(library: Any, torch: Any, folder: Path) -> Any:
    """open_clip's network for names without a configuration of open_clip's."""
    notes = json.loads((folder / pretrained.NOTES).read_text(encoding="utf-8"))
    preprocess = notes["preprocess"]
    config = open_clip.to_config(notes["model"], preprocess["mean"], preprocess["std"])
    network = library.CLIP(**config["model_cfg"])
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    network.load_state_dict({n: t for n, t in tensors.items() if n not in openai.SIZES})
    return network


def _features(image, text, logit_scale, logit_bias) -> Features:
    image, text = (
        np.asarray(x) / np.linalg.norm(np.asarray(x), axis=-1, keepdims=True) for x in (image, text)
    )
    return Features(image, text, np.exp(np.asarray(logit_scale)) * image @ text.T + logit_bias)
