"""Models that were trained, read back: those of runs, and of other programs' files."""

import contextlib
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from declip_jax.checkpoint import Checkpoints, digest_of
from declip_jax.config import Config
from declip_jax.encode import Encoder
from declip_jax.evals import suite
from declip_jax.evals.options import Eval, Retrieval, Zeroshot
from declip_jax.evals.preprocess import CLIP, Preprocess, preprocess
from declip_jax.files import write_text
from declip_jax.interop import pretrained
from declip_jax.interop.architecture import config_of
from declip_jax.interop.pretrained import Pretrained
from declip_jax.interop.transfer import resized
from declip_jax.methods.base import encoders
from declip_jax.models.two_towers import Model, two_towers
from declip_jax.parallel.mesh import MeshShape, make_mesh, replicated
from declip_jax.state import TrainState
from declip_jax.step import Setup

IMPORTED = "imported.json"


class OfRun(NamedTuple):
    """The model of a run, the step it is of, samples seen until then, and the configuration."""

    model: Pretrained
    step: int
    samples: int
    config: Config


def read(path: str | Path, format: str = "") -> Pretrained:
    """Reads the newest model of a run's workdir, or what `interop.pretrained.read` does. Raises
    ValueError if nothing there can be used."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        if format:
            raise ValueError(f"{path} is the workdir of a run: its model has no format to name.")
        return read_run(path).model
    return pretrained.read(path, format)


def read_run(workdir: Path, step: str = "newest", ema: bool | None = None) -> OfRun:
    """Reads a model from a run's checkpoint, without its optimizer.

    Args:
      workdir, step: as for `load`.
      ema: the moving average of its parameters; None: if there is one.

    Raises ValueError: no workdir, no such checkpoint, a damaged one.
    """
    with contextlib.closing(Checkpoints.of_run(workdir)) as checkpoints:
        chosen = checkpoints.find(step)
        record = checkpoints.record(chosen)
        variables = checkpoints.restore_model(chosen, ema)
    # The first runs of all had no protocol: their models' images are resized to the crop.
    usual = None if "preprocess" in record["config"]["eval"] else "train"
    config = Config.recorded(record["config"], str(workdir), usual)
    sizes = config.model.as_dict()
    sizes = {name: sizes[name] for name in ("embed_dim", "activation", "image", "text")}
    seen = dict(mean=config.image_mean, std=config.image_std)
    seen["short_side"] = config.preprocess.short_side
    told = workdir, "declip_jax", config.method, None
    model = Pretrained(*told, variables, sizes, unknown=(), **seen)
    return OfRun(model, chosen, record["samples"], config)


def complete(model: Pretrained) -> Pretrained:
    """A model with the preprocessing that its format usually has, where the file does not tell it.
    Raises ValueError if the file does not tell the activation function either."""
    if model.model["activation"] is None:
        raise ValueError(
            f"{model.source} does not tell the activation function: say whose file it is, with "
            "openai (QuickGELU), alip or open_clip (GELU) as its format, or put it beside its "
            "open_clip_config.json."
        )
    resolution = model.model["image"]["resolution"]
    usual = preprocess("declip" if model.format == "declip" else "openai", resolution, *CLIP)
    return model._replace(
        mean=model.mean or usual.mean,
        std=model.std or usual.std,
        short_side=model.short_side or usual.short_side,
    )


def protocol(model: Pretrained) -> str:
    """The `config.eval.preprocess` that a complete model's preprocessing is."""
    resolution = model.model["image"]["resolution"]
    seen = Preprocess(model.short_side, resolution, model.mean, model.std)
    known = ("openai", "declip", "train")
    fits = (n for n in known if seen == preprocess(n, resolution, model.mean, model.std))
    return next(fits, "weights")


def name_of(path: Path) -> str:
    """What to call weights: a file's name without its endings, or where that says nothing, the
    folder's."""
    path = path.absolute()
    name = re.sub(r"(\.(pt|pth|tar|bin|safetensors))*$", "", path.name)
    says_nothing = r"(open_clip_)?(pytorch_)?(model|weights|checkpoint|ckpt)"
    return path.parent.name if path.is_file() and re.fullmatch(says_nothing, name) else name


class Trained(NamedTuple):
    """A trained model, ready to encode."""

    method: str  # that trained it
    model: Model  # section of the configuration, as `eval` is
    eval: Eval
    shared: suite.Shared  # what its evaluations have in common
    encoder: Encoder  # in use of the model
    state: TrainState  # what was restored; of another program's weights their variables alone
    step: int  # of the checkpoint, 0 of another program's weights
    digest: str  # of its arrays
    record: dict[str, Any]  # of the checkpoint: samples seen, its configuration (completed), …
    setup: Setup | None = None  # what it was restored into; None of another program's weights

    @property
    def config(self) -> Config | None:
        """Of the run, with the mesh of this machine; None of another program's weights."""
        return self.setup and self.setup.config


def load(workdir: Path, step: str = "newest", preprocess: str | None = None) -> Trained:
    """Loads the model of a run.

    Args:
      workdir: of the run.
      step: of the checkpoint: a number, "newest" or "best" (by the run's own best metric).
      preprocess: in place of the run's `config.eval.preprocess`.

    Raises ValueError: no workdir, no such checkpoint, a damaged one.
    """
    with contextlib.closing(Checkpoints.of_run(workdir)) as checkpoints:
        chosen = checkpoints.find(step)
        record = checkpoints.record(chosen)
        config = Config.recorded(record["config"], str(workdir), preprocess)
        record["config"] = config.record()
        # This machine's devices, not those of the training: as many as share its work evenly.
        model = dataclasses.replace(config.model, attention="xla")
        config = dataclasses.replace(config, mesh=MeshShape(data=-1, fsdp=1), model=model)
        sizes = {"eval.batch_size": config.eval.batch_size}
        sizes["loss.support_set.size"] = config.loss.support_set.size
        setup = Setup(config, _devices(sizes))
        state = checkpoints.restore(chosen, setup.abstract_state)
    shared = suite.shared(config.eval, config.preprocess)
    encoder = setup.encoder().use(state.eval_params, state.model_state)
    told = config.method, config.model, config.eval, shared, encoder
    return Trained(*told, state, chosen, digest_of(record), record, setup)


class Imported(NamedTuple):
    """What of another program was evaluated in a workdir, as `WORKDIR/imported.json` keeps it."""

    path: str  # of the weights, or of a folder with them
    format: str = ""  # one of `interop.pretrained.FORMATS`; "": told by the names
    image_size: int = 0  # to fit the positions to, as `context`; 0: the model's
    context: int = 0
    preprocess: str = ""  # in place of what goes with the weights
    digest: str = ""  # of the model, "" before it was read

    @classmethod
    def of(cls, workdir: Path) -> "Imported":
        """What was evaluated in a workdir. Raises ValueError if its file is damaged."""
        file = workdir / IMPORTED
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is not what evaluate writes ({error}).") from error

    def keep(self, workdir: Path) -> None:
        """Writes it down. Raises ValueError if the workdir has scores of another model."""
        file = workdir / IMPORTED
        if (workdir / "checkpoints").is_dir():
            raise ValueError(f"--workdir={workdir} is a run's: give --init one of its own.")
        if file.exists() and (before := Imported.of(workdir)).digest != self.digest:
            raise ValueError(
                f"--workdir={workdir} has scores of another model ({before.path}, or what it was "
                "then): give --init one of its own."
            )
        write_text(file, json.dumps(self._asdict(), indent=1) + "\n")


def load_imported(imported: Imported) -> Trained:
    """Loads weights of another program.

    Raises:
      ValueError: what `read` refuses, a model whose activation function is not known, or one that
        has changed since `imported` was written.
    """
    model = complete(read(imported.path, imported.format))
    print(f"{model.describe()}.", file=sys.stderr)
    resolution = imported.image_size or model.model["image"]["resolution"]
    context = imported.context or model.model["text"]["context"]
    model, notes = resized(model, resolution, context)
    used = imported.preprocess or protocol(model)
    for note in (*model.notes, *notes, f"preprocessing: {used!r}"):
        print(f"  {note}", file=sys.stderr)
    digest = model.digest()
    if imported.digest not in ("", digest):
        raise ValueError(f"{imported.path} has changed since it was evaluated.")
    section = Model.read(config_of(model.model), "config.model")
    evaluation = Eval(  # how it is evaluated here
        every=0,
        batch_size=256,
        preprocess=used,
        suite="",
        data_dir="data",
        zeroshot=Zeroshot(source="", split="test", templates=("a photo of a {}.",)),
        retrieval=Retrieval(source="", split="test", prefix=""),
    )
    seen = preprocess(used, resolution, model.mean, model.std)
    if used == "weights":
        seen = seen._replace(short_side=model.short_side)
        used += f" ({model.short_side} px, mean {model.mean}, deviation {model.std})"
    batch_size = evaluation.batch_size
    mesh = make_mesh(-1, 1, _devices({"eval.batch_size": batch_size}))
    kinds = jax.device_put(dict(model.variables), replicated(mesh))
    none = dict.fromkeys(("opt_state", "ema", "rng"))
    state = TrainState(step=0, params=kinds.pop("params"), model_state=kinds, **none)
    encoder = Encoder(encoders(two_towers(section)), seen, batch_size, context, mesh)
    encoder = encoder.use(state.params, state.model_state)
    told = dict(method=model.method, model=section.as_dict())
    told |= dict(image_mean=model.mean, image_std=model.std)
    record = {"samples": 0, "config": json.loads(json.dumps(told))}
    shared = suite.shared(evaluation, seen, used)
    return Trained(model.method, section, evaluation, shared, encoder, state, 0, digest, record)


def _devices(sizes: dict[str, int]) -> list[jax.Device]:
    """As many devices as divide all of these sizes, fields of the configuration."""
    shares = math.gcd(*sizes.values())
    count = max(n for n in range(1, jax.device_count() + 1) if shares % n == 0)
    if count < jax.device_count():
        fields = " and ".join(f"config.{name}={size}" for name, size in sizes.items())
        few = f"Using {count} of {jax.device_count()} devices"
        print(f"{few}: more do not divide {fields}.", file=sys.stderr)
    return jax.devices()[:count]
