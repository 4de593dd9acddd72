"""Configurations that earlier versions of this program recorded, as today's.

A recorded configuration has a "version"; the first ones have none, which is 0. A change to
configs/common.py that old runs must be read with has its line here: fields that are added get the
values with which a run does what it did before, one dict more in `_ADDED` raising VERSION; a field
with a new name is mapped. Options of towers, which have values of their own, need no line.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging

# Names that have changed since version 0: old ones also work on the command line and in files.
RENAMED = {
    "loss.mlm_places": "loss.mlm_capacity",
    "loss.support_set.neighbours": "loss.support_set.neighbors",
    "views.weak.grey_prob": "views.weak.grayscale_prob",
    "views.strong.grey_prob": "views.strong.grayscale_prob",
}

# What records of version 0, 1, … lack, and what runs did without it; version 0 itself grew.
_ADDED = (
    {
        "microbatches": 1,
        "init_from": "",
        "init_resize": False,
        "model": {
            "attention": "xla",
            "heads": dict(projector=1024, predictor=512, simclr_hidden=4096, simclr=256, dense=256),
        },
        "loss": {
            "max_scale": 0.0,
            "temperature": 0.1,
            "contrast_masked": True,
            "mlm_capacity": 0.2,
            "support_set": dict(size=65_536, neighbors=1, young_steps=2),
            "late_interaction": dict(tokens=16, mask_padding=False, all_views=False),
            "adaptive": dict(momentum=0.99, gamma=2.0),
            "ring_threshold": 8192,
            "block": 1024,
        },
        "views": {
            "strong": dict(
                crop_scale=(0.2, 1.0),
                crop_ratio=(3 / 4, 4 / 3),
                flip=0.5,
                jitter=(0.4, 0.4, 0.4, 0.1),
                jitter_prob=0.8,
                grayscale_prob=0.2,
                blur_prob=0.5,
                blur_sigma=(0.1, 2.0),
            )
        },
        "data": {
            "columns": dict(image="", captions=(), synthetic=(), key="", label=""),
            "mixture": (),
            "index_cache": "",
            "max_bad_fraction": 0.0,  # the first bad record ended the run
            "bad_window": 10_000,
            "token_lengths": (),  # captions were as long as the context
            "mask_rate": 0.15,
            "eda": ("synonym", "swap", "delete"),
            "synonyms": "",
        },
        "optim": {"name": "adamw", "momentum": 0.9, "lr_rules": (("", 1.0),)},
        "eval": {"suite": "", "data_dir": "data"},
    },
)
VERSION = len(_ADDED)


def complete(recorded: Mapping[str, Any], where: str, preprocess: str | None = None) -> dict:
    """A recorded configuration as `Config.read` takes it.

    Args:
      recorded: of a checkpoint's record.
      where: it comes from, for messages.
      preprocess: in place of `eval.preprocess`.

    Raises ValueError: it is of a later version, or has a field that no version knows how to map.
    """
    recorded = dict(recorded)
    version = recorded.pop("version", 0)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{where} was written by a later version (configuration {version}, this program knows "
            f"up to {VERSION}): update declip_jax."
        )
    recorded = renamed(recorded, told=False)
    for lacking in _ADDED[version:]:
        recorded = _merge(lacking, recorded)
    if version == 0:
        recorded["eval"] = _protocol(recorded, where, preprocess)
    if preprocess:
        recorded["eval"] = {**recorded["eval"], "preprocess": preprocess}
    return recorded


def renamed(values: Mapping[str, Any], told: bool = True) -> dict[str, Any]:
    """A copy of nested dicts in which fields with an old name have the new one."""
    copy = _merge({}, values)
    rename(copy, told)
    return copy


def rename(values: Any, told: bool = True) -> None:
    """Gives fields of nested dicts, or of a ConfigDict that is not locked, their new names."""
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        found = values
        for part in sections:
            found = found[part] if part in found else {}
        if name in found:
            found[new.rpartition(".")[2]] = found[name]
            del found[name]
            if told:
                logging.warning("config.%s is called config.%s now.", old, new)


def _merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `second`, with what `first` has beside it, at every depth."""
    merged = dict(first)
    for name, value in second.items():
        if isinstance(value, Mapping):
            value = _merge(first.get(name, {}), value)
        merged[name] = value
    return merged


def _protocol(recorded: Mapping[str, Any], where: str, preprocess: str | None) -> dict[str, Any]:
    """The section `eval`, whose `preprocess` the first versions had as `resize`: the short side
    before the crop, and the run's own mean and deviation."""
    section = dict(recorded["eval"])
    side = section.pop("resize", None)
    if "preprocess" in section or preprocess:
        return section
    resolution = recorded["model"]["image"]["resolution"]
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    own = tuple(recorded["image_mean"]), tuple(recorded["image_std"])
    if side == resolution:
        return {**section, "preprocess": "train"}
    if side == round(resolution * 256 / 224) and own == imagenet:
        return {**section, "preprocess": "declip"}
    raise ValueError(
        f"{where} is of a version without config.eval.preprocess (config.eval.resize={side}): say "
        "which --preprocess."
    )
