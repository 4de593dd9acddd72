"""Models of ours as files of others."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.interop import declip, huggingface, open_clip, openai, tables
from declip_jax.interop.architecture import TOWERS, part_of, sections
from declip_jax.interop.pretrained import ACTIVATIONS, NOTES, Pretrained, layout_of
from declip_jax.interop.tokenizer_files import write_json, write_tokenizer
from declip_jax.models.tower import ImageTower
from declip_jax.models.vit import ViT

FILES = {"open_clip": "open_clip_model.safetensors"}  # other formats: model.safetensors


def adapt(model: Pretrained, format: str) -> tuple[Pretrained, list[str]]:
    """A model as a format can hold it, and what changes on the way, in lines.

    A bias of the text projection, which only open_clip and DeCLIP have, moves into the bias of the
    LayerNorm before it: features stay what they are, up to rounding. Heads stay behind but in
    DeCLIP's format.

    Raises ValueError: what the format's program would compute otherwise, all of it, by field.
    """
    notes, sizes, variables = [], model.model, model.variables
    image, text = sections(sizes)
    towers = {"image": image, "text": text}
    problems = [
        f"{section}.{name}={getattr(tower, name)!r}, there it is {usual!r}"
        for section, tower in towers.items()
        for name, usual in tower.options().items()
        if getattr(tower, name) != usual and name not in ImageTower.OF_TRAINING
    ]
    if "logit_bias" in variables["params"] and format != "open_clip":
        problems.append("init_logit_bias is set, there logits have no bias")
    activation = ACTIVATIONS.get(format, sizes["activation"])
    if sizes["activation"] != activation:
        problems.append(f"activation={sizes['activation']!r}, there it is {activation!r}")
    if format in ("openai", "alip"):
        problems += [
            f"{name}.heads={tower.heads}, there a head has 64 of the {tower.token_width} channels"
            for name, tower in towers.items()
            if tower.token_width != 64 * tower.heads
        ]
    if format == "huggingface" and not isinstance(image, ViT):
        problems.append(f"image.kind={image.kind!r}, there is no ResNet there")
    if format == "declip" and not text.proj_bias:
        problems.append("text.proj_bias=False, there the projection of texts has a bias")
    vocabulary, end = f"text.vocab_size={text.vocab_size}", text.eot_id
    if format == "declip" and text.vocab_size != end + 2:
        problems.append(f"{vocabulary}, there the end token and the mask are last")
    # At the largest id of a text its feature is read there; the mask's is in none.
    if format in ("open_clip", "openai", "alip") and text.vocab_size > end + 2:
        problems.append(f"text.eot_id={end} of {vocabulary}, there a text ends in its largest id")
    if problems:
        raise ValueError(
            f"{model.source} cannot be written in the format {format!r}: it would compute "
            "something else." + "".join(f"\n  config.model.{problem}" for problem in problems)
        )

    if format == "open_clip" and model.short_side != image.resolution:
        notes.append(
            f"the run's evaluation resizes the short side to {model.short_side} pixels before the "
            f"crop; open_clip will resize it to the crop's {image.resolution}"
        )
    if format == "huggingface" and text.eot_id != CLIP_TOKENIZER.end:
        notes.append("the tokenizer stays behind: the vocabulary is another one")
    held = {*TOWERS, "logit_bias"}  # which other formats were refused with
    held |= declip.HEADS if format == "declip" else set()
    if heads := sorted({*variables["params"]} - held):
        where = "no format has" if format == "declip" else "only DeCLIP's format may have"
        notes.append(f"left out, since {where} them: {', '.join(heads)}")
        variables = part_of(variables, held)
    if text.proj_bias and format in ("huggingface", "openai", "alip"):
        params, shift = _without_bias(variables["params"], format)
        variables = {**variables, "params": params}
        sizes = {**sizes, "text": {**text.as_dict(), "proj_bias": False}}
        notes.append(
            "the bias of the text projection, which this format does not have, was moved into "
            f"ln_final.bias (which changes by {shift:.2g} at most): text features stay the same "
            "up to rounding"
        )
    return model._replace(model=sizes, variables=variables), notes


def state_dict(model: Pretrained, format: str) -> dict[str, np.ndarray]:
    """The arrays of an adapted model under the format's names."""
    arrays = tables.dump(table_of(model, format), model.variables)
    if format == "openai":  # they tell its files from open_clip's and ALIP's
        image, text = model.model["image"], model.model["text"]
        sizes = image["resolution"], text["context"], text["vocab_size"]
        arrays |= dict(zip(openai.SIZES, map(np.asarray, map(np.int64, sizes)), strict=True))
    return arrays


def table_of(model: Pretrained, format: str) -> tables.Layout:
    """The layout that an adapted model is written with."""
    kind, proj_bias = model.model["image"]["kind"], model.model["text"]["proj_bias"]
    return layout_of(format, kind, model.method, proj_bias)


def write(folder: Path, model: Pretrained, format: str, notes: dict[str, Any]) -> None:
    """Writes an adapted model: weights, what the format's library wants beside them, and notes.

    Args:
      folder: exists, empty.
      model: from `adapt`, for this format; its mean, std and short_side are known.
      notes: where the model comes from; they go into NOTES, which reading heeds.
    """
    file = folder / FILES.get(format, "model.safetensors")
    file.touch()
    mode = file.stat().st_mode
    # Transformers wants to know whose arrays they are.
    safetensors.numpy.save_file(state_dict(model, format), file, metadata={"format": "pt"})
    file.chmod(mode)  # as files are made here: safetensors lets nobody but their owner read its own
    preprocess = {
        "short_side": model.short_side,
        "resolution": model.model["image"]["resolution"],
        "interpolation": "bicubic",
        "mean": model.mean,
        "std": model.std,
    }
    if format == "open_clip":
        config = open_clip.to_config(model.model, model.mean, model.std, model.variables["params"])
        write_json(folder / "open_clip_config.json", config)
    if format == "huggingface":
        write_json(folder / "config.json", huggingface.to_config(model.model))
        config = huggingface.to_preprocessor_config(preprocess)
        write_json(folder / "preprocessor_config.json", config)
        if model.model["text"]["eot_id"] == CLIP_TOKENIZER.end:
            write_tokenizer(folder, model.model["text"]["context"])
    told = {"format": format, "weights": file.name, "method": model.method, "model": model.model}
    write_json(folder / NOTES, {**told, "preprocess": preprocess, **notes})


def _without_bias(params: dict[str, Any], format: str) -> tuple[dict[str, Any], float]:
    """Parameters whose text projection has no bias, and the largest change of the LayerNorm's.

    x @ W + b = (x + d) @ W for d with d @ W = b, and x ends in adding the LayerNorm's bias.
    """
    text = params["text"]
    kernel, bias = (np.asarray(text["proj"][name], np.float64) for name in ("kernel", "bias"))
    shift = np.linalg.lstsq(kernel.T, bias)[0]
    before = text["ln_final"]["bias"]
    after = (before + shift).astype(np.float32)
    off = np.linalg.norm((after.astype(np.float64) - before) @ kernel - bias)
    # Features are about as long as the kernel's norm, since what it multiplies has unit variance.
    if not off <= 1e-6 * np.linalg.norm(kernel):
        raise ValueError(
            f"the format {format!r} has no bias in the projection of texts "
            "(config.model.text.proj_bias), and this one cannot be moved elsewhere: the "
            f"projection, {kernel.shape[0]} to {kernel.shape[1]}, does not reach it. open_clip's "
            "format has one."
        )
    text = {**text, "ln_final": {**text["ln_final"], "bias": after}}
    text["proj"] = {"kernel": text["proj"]["kernel"]}
    return {**params, "text": text}, float(np.abs(shift).max())
