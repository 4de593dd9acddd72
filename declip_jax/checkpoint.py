"""Checkpoints: the training state, the position in the data, and the configuration.

Orbax writes asynchronously and atomically. Beside the arrays lies a small JSON record with the
step, the number of samples seen and a digest of the data they come from, the whole configuration,
and a fingerprint of every leaf: array files whose bytes were flipped on disk would otherwise be
restored without a word.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict
from orbax.checkpoint import checkpoint_managers

from declip_jax.digests import digest
from declip_jax.models.tower import ImageTower
from declip_jax.parallel.rules import path_name
from declip_jax.section import Section, at_least
from declip_jax.state import TrainState

# Settings of the model that change how it is computed, not what it is; and the methods' own layers,
# which not every method has: where one does not fit, restoring says so by its name.
_FREE = ("model.scan", "model.remat", "model.dtype", "model.attention", "model.heads.")
_FREE += ("model.init_logit_scale", *(f"model.image.{n}" for n in ImageTower.OF_TRAINING))


_MODEL_STATE = "extra"  # what `TrainState.model_state` is called on disk, as in the first runs


class CheckpointPolicy(Section):
    """The section `config.checkpoint`; configs/common.py tells of each field."""

    every: int = at_least(1)
    keep: int = at_least(1)
    best_metric: str


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: its message says why and what to do."""


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder; they go to `workdir/checkpoints`.
      keep: how many of the newest to keep.
      best_metric: also keep the best by this metric; "" for none.
      read_only: never write, never delete.
    """

    def __init__(
        self, workdir: Path, keep: int = 1, best_metric: str = "", *, read_only: bool = False
    ):
        self._folder = workdir.absolute() / "checkpoints"

        def score(metrics: dict[str, float]) -> float:
            return metrics.get(best_metric, -math.inf)  # most checkpoints have no evaluation

        policies = [checkpoint_managers.LatestN(keep)]
        if best_metric:
            policies.append(checkpoint_managers.BestN(get_metric_fn=score, n=1))
        verbosity = logging.get_verbosity()
        if read_only:
            logging.set_verbosity(logging.ERROR)  # Orbax warns that it will only read
        try:
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                    best_fn=score if best_metric else None,  # has Orbax keep the metrics on disk
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "record": ocp.JsonCheckpointHandler(),
                },
            )
        finally:
            logging.set_verbosity(verbosity)

    @classmethod
    def of_run(cls, workdir: Path) -> "Checkpoints":
        """Those of a run, to read. Raises CheckpointError if there is none."""
        if not (workdir / "checkpoints").is_dir():
            raise CheckpointError(f"{workdir} holds no checkpoints: train there first.")
        return cls(workdir, read_only=True)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self, metric: str) -> int | None:
        """The step whose checkpoint has the highest `metric`, or None."""
        metrics = {step: self._manager.metrics(step) or {} for step in self.steps()}
        scored = {step: found[metric] for step, found in metrics.items() if metric in found}
        return max(scored, key=scored.get) if scored else None

    def find(self, step: str) -> int:
        """The step that a number, "newest" or "best" (by the run's own best metric) means.

        Raises CheckpointError: no complete checkpoint, or not this one.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self._folder.parent} holds no complete checkpoint yet.")
        if step == "newest":
            chosen = steps[-1]
        elif step == "best":
            chosen = self.best(self.record(steps[-1])["config"]["checkpoint"]["best_metric"])
        else:
            chosen = int(step) if step.isdecimal() else None
        if chosen not in steps:
            raise CheckpointError(
                f"--step={step} is not a checkpoint of {self._folder.parent}: expected one of "
                f"{steps}, 'newest', or 'best' if the run had a config.checkpoint.best_metric."
            )
        return chosen

    def save(
        self,
        state: TrainState,
        samples: int,
        data: str,
        config: dict[str, Any],
        metrics: dict[str, float],
    ) -> str:
        """Starts writing `state`, of a step; a later `save` or `close` waits for it.

        Beside it go the samples that the run has seen, its position in the data; what changes with
        the data, from which their order follows; the run's `Config.record`; and the metrics of an
        evaluation at this step, else none. Returns the checkpoint's digest, see `digest_of`.
        """
        step = int(state.step)
        record = {
            "step": step,
            "samples": samples,
            "data": data,
            "config": config,
            "fingerprint": _fingerprint(_on_disk(state)),
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_on_disk(state)), record=ocp.args.JsonSave(record)
            ),
            metrics=metrics,
        )
        return digest_of(record)

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a step: step, samples, data, config, fingerprint."""
        return self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        ).record

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a step's state, `like` ShapeDtypeStructs with shardings, from whatever mesh.

        Raises:
          CheckpointError: leaves missing, unexpected or of another shape or dtype (each named), or
            bytes that changed on disk.
        """
        wanted = _on_disk(like)
        self._check_leaves(step, wanted)
        state = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        ).state
        self._check_bytes(step, state)
        return TrainState(model_state=state.pop(_MODEL_STATE), **state)

    def restore_model(self, step: int, ema: bool | None = None) -> dict[str, Any]:
        """Restores the model alone, of any configuration, as host arrays: {"params": …} and, of a
        model that has them, {"batch_stats": …}. With `ema` the moving average of the parameters;
        None: if there is one.

        Raises CheckpointError: there is no moving average, or bytes that changed on disk.
        """
        metadata = self._manager.item_metadata(step)["state"]
        averaged = bool(jax.tree.leaves(metadata["ema"]))
        if ema and not averaged:
            raise CheckpointError(
                f"{self._folder / str(step)} has no moving average: config.ema_decay was 0."
            )
        params = "ema" if averaged and ema is not False else "params"
        wanted = {params: metadata[params]}
        if "batch_stats" in (of_model := metadata[_MODEL_STATE]):
            wanted[_MODEL_STATE] = {"batch_stats": of_model["batch_stats"]}
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), wanted
        )
        # Not by the manager: it restores the whole state or nothing.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arguments = ocp.checkpoint_utils.construct_restore_args(like)
            state = checkpointer.restore(
                self._folder / str(step) / "state",
                args=ocp.args.PyTreeRestore(like, arguments, partial_restore=True),
            )
        self._check_bytes(step, state)
        return jax.device_get({"params": state[params], **state.get(_MODEL_STATE, {})})

    def _check_bytes(self, step: int, state: Any) -> None:
        saved = self.record(step)["fingerprint"]
        damaged = [name for name, value in _fingerprint(state).items() if saved[name] != value]
        if damaged:
            raise CheckpointError(
                f"The checkpoint {self._folder / str(step)} is damaged: {', '.join(damaged)} "
                "changed since it was written. Move that folder away to continue from the one "
                f"before it (steps here: {self.steps()})."
            )

    def _check_leaves(self, step: int, like: dict[str, Any]) -> None:
        # Orbax casts another dtype without a word, and its error for a shape names no leaf.
        metadata = self._manager.item_metadata(step)["state"]
        saved = {path_name(p): (tuple(m.shape), np.dtype(m.dtype)) for p, m in _leaves(metadata)}
        wanted = {path_name(p): (tuple(x.shape), np.dtype(x.dtype)) for p, x in _leaves(like)}
        problems = [f"missing: {name}" for name in sorted(wanted.keys() - saved.keys())]
        problems += [f"unexpected: {name}" for name in sorted(saved.keys() - wanted.keys())]
        problems += [
            f"{name}: saved as {saved[name][0]} {saved[name][1]}, "
            f"expected {wanted[name][0]} {wanted[name][1]}"
            for name in sorted(saved.keys() & wanted.keys())
            if saved[name] != wanted[name]
        ]
        if problems:
            shown = "\n  ".join(problems[:20])
            more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(
                f"The checkpoint {self._folder / str(step)} does not fit the model and optimizer "
                f"in hand:\n  {shown}{more}\nUse the configuration that it was trained with, or "
                "another workdir."
            )

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def digest_of(record: dict[str, Any]) -> str:
    """What tells a checkpoint from all others, of its JSON record: follows from its arrays."""
    return digest(record["fingerprint"])


def config_differences(saved: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compares a saved configuration with the one in hand, both of them `Config.record`s.

    Returns:
      Two lists of "field: saved -> now": what makes it another model (`method`, `model`), and the
      other settings.
    """
    old, new = flatten_dict(saved, sep="."), flatten_dict(now, sep=".")
    model, other = [], []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name, "(absent)") == new.get(name, "(absent)"):
            continue
        line = f"{name}: {old.get(name, '(absent)')!r} -> {new.get(name, '(absent)')!r}"
        is_model = name == "method" or (name.startswith("model.") and not name.startswith(_FREE))
        (model if is_model else other).append(line)
    return model, other


def _on_disk(state: TrainState) -> dict[str, Any]:
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {_MODEL_STATE if name == "model_state" else name: x for name, x in parts.items()}


def _leaves(tree) -> list:
    return jax.tree_util.tree_leaves_with_path(tree)


def _fingerprint(state: Any) -> dict[str, int]:
    """A uint32 of every leaf's bits and their order; the same however the leaf is sharded."""
    values = jax.device_get(_fingerprint_on_device(state))
    return {path_name(path): int(value) for path, value in _leaves(values)}


@jax.jit
def _fingerprint_on_device(state):
    def leaf(x):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        bits = x.astype(jnp.uint32)
        # Odd weights by position: flipping bits or moving values changes the sum. Integer sums
        # are exact in any order, so the sharding does not matter.
        weights = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            weights = weights * jnp.uint32(2654435761) + index
        return (bits * (2 * weights + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(leaf, state)
