"""What a run starts from, or an evaluation without a run: the model of a run, or of another
program's file."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from declip_jax.checkpoint import Checkpoints
from declip_jax.evals.preprocess import CLIP, IMAGENET, preprocess
from declip_jax.interop import pretrained
from declip_jax.interop.pretrained import Pretrained
from declip_jax.interop.transfer import fit
from declip_jax.state import TrainState


class OfRun(NamedTuple):
    """The model of a run, the step it is of, and the checkpoint's record."""

    model: Pretrained
    step: int
    record: dict[str, Any]


def read(path: str | Path, format: str = "") -> Pretrained:
    """Reads the newest model of a run's workdir, or what `interop.pretrained.read` does.

    Raises:
      ValueError: nothing there that can be used.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        if format:
            raise ValueError(f"{path} is the workdir of a run: its model has no format to name.")
        return read_run(path).model
    return pretrained.read(path, format)


def read_run(workdir: Path, step: str = "newest", ema: bool | None = None) -> OfRun:
    """Reads a model from a run's checkpoint, without its optimizer.

    Args:
      workdir: of the run.
      step: a number, "newest" or "best".
      ema: the moving average of its parameters; None: if there is one.

    Raises:
      ValueError: no workdir, no such checkpoint, a damaged one.
    """
    checkpoints = Checkpoints.of_run(workdir)
    try:
        chosen = checkpoints.find(step)
        record = checkpoints.record(chosen)
        variables = checkpoints.restore_model(chosen, ema)
    finally:
        checkpoints.close()
    config = record["config"]
    sizes = {name: config["model"][name] for name in ("embed_dim", "activation", "image", "text")}
    side = sizes["image"]["resolution"]
    if "preprocess" in config["eval"]:  # a field that old runs do not have
        side = preprocess(ConfigDict(config)).short_side
    model = Pretrained(
        workdir,
        "declip_jax",
        config["method"],
        None,
        variables,
        {**sizes, "image": {k: _plain(v) for k, v in sizes["image"].items()}},
        unknown=(),
        mean=_plain(config["image_mean"]),
        std=_plain(config["image_std"]),
        short_side=side,
    )
    return OfRun(model, chosen, record)


def complete(model: Pretrained) -> Pretrained:
    """A model with the preprocessing that its format usually has, where the file does not tell it.

    Raises:
      ValueError: the file does not tell the activation function either.
    """
    if model.model["activation"] is None:
        raise ValueError(
            f"{model.source} does not tell the activation function: say whose file it is, with "
            "openai (QuickGELU), alip or open_clip (GELU) as its format, or put it beside its "
            "open_clip_config.json."
        )
    resolution = model.model["image"]["resolution"]
    usual = IMAGENET if model.format == "declip" else CLIP
    side = round(resolution * 256 / 224) if model.format == "declip" else resolution
    return model._replace(
        mean=model.mean or usual[0],
        std=model.std or usual[1],
        short_side=model.short_side or side,
    )


def protocol(model: Pretrained) -> str:
    """The `config.eval.preprocess` that a complete model's preprocessing is."""
    side, resolution = model.short_side, model.model["image"]["resolution"]
    if (model.mean, model.std) == CLIP and side == resolution:
        return "openai"
    if (model.mean, model.std) == IMAGENET and side == round(resolution * 256 / 224):
        return "declip"
    return "train" if side == resolution else "weights"


def name_of(path: Path) -> str:
    """What to call weights: a file's name without its endings, or where that says nothing, the
    folder's."""
    path = path.absolute()
    name = re.sub(r"(\.(pt|pth|tar|bin|safetensors))*$", "", path.name)
    says_nothing = r"(open_clip_)?(pytorch_)?(model|weights|checkpoint|ckpt)"
    return path.parent.name if path.is_file() and re.fullmatch(says_nothing, name) else name


def start(config, init_state: Callable[[], TrainState], say: Callable[[str], Any]) -> TrainState:
    """A run's first state with the model that `config.init_from` names.

    Args:
      config: of the run.
      init_state: makes it without that model, sharded.
      say: is told what was taken, and what was not.

    Raises:
      ValueError: a file that cannot be used, or another model.
    """
    given = read(config.init_from)
    say(f"Starts from {given.describe()}.")
    state = init_state()
    fresh = {"params": state.params}
    if "batch_stats" in state.model_state:
        fresh["batch_stats"] = state.model_state["batch_stats"]
    taken, notes = fit(given, fresh, config.model, config.init_resize)
    here = tuple(config.image_mean), tuple(config.image_std)
    if given.mean and given.std and here != (given.mean, given.std):
        notes.append(
            f"its images were normalized with mean {given.mean} and deviation {given.std}, those "
            f"of this run are with {here[0]} and {here[1]}"
        )
    for note in notes:
        say(f"  {note}")

    def place(value: np.ndarray, leaf: jax.Array) -> jax.Array:
        if value.shape == leaf.shape:
            index = functools.partial(np.ndarray.__getitem__, value)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, index)
        # The first rows, of tokens. By a program, since other processes may hold other parts.
        put = jax.jit(
            lambda leaf, rows: leaf.at[: len(rows)].set(rows), out_shardings=leaf.sharding
        )
        return put(leaf, value)

    leaves = flatten_dict(fresh)
    leaves |= {path: place(value, leaves[path]) for path, value in flatten_dict(taken).items()}
    variables = unflatten_dict(leaves)
    params = variables.pop("params")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema, model_state={**state.model_state, **variables})


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
