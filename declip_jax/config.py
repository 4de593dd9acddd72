"""The configuration of a run: its sections, read and checked once.

What users write is an ml_collections ConfigDict (configs/common.py has the values, with a comment
on each field). `Config.read` makes frozen sections of it; below `step.Setup` each function gets
the sections that it heeds. Checkpoints keep `Config.record()`, and `versions.complete` makes it
readable for all later versions.
"""

import json
from collections.abc import Mapping
from typing import Any

from declip_jax import versions
from declip_jax.augment import View
from declip_jax.checkpoint import CheckpointPolicy
from declip_jax.data.options import Data
from declip_jax.evals.options import Eval
from declip_jax.evals.preprocess import Preprocess, preprocess
from declip_jax.losses.options import Loss
from declip_jax.models.two_towers import Model
from declip_jax.optim import Optim
from declip_jax.parallel.mesh import MeshShape
from declip_jax.section import Section, at_least, between, option, types_alone


class Profile(Section):
    steps: tuple[int, ...] = option(expected="(first, last), or () for no profile")


class Config(Section):
    """All of a run's configuration."""

    method: str
    seed: int = between(0, 2**32 - 1)
    batch_size: int = at_least(1)
    total_steps: int = at_least(1)
    microbatches: int = at_least(1)
    model: Model
    init_from: str
    init_resize: bool
    loss: Loss
    views: dict[str, View]  # that methods name
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    data: Data
    optim: Optim
    ema_decay: float = between(0, 1, edges="[)")
    mesh: MeshShape
    compilation_cache: str
    profile: Profile
    log_every: int = at_least(1)
    checkpoint: CheckpointPolicy
    eval: Eval

    @classmethod
    def read(cls, values: Any, where: str = "config") -> "Config":
        """The configuration that a ConfigDict describes, old names of fields included.

        Raises ValueError: naming the field, its value, and what was expected.
        """
        if isinstance(values, cls):
            return values
        return super().read(
            versions.renamed(values.to_dict() if hasattr(values, "to_dict") else values), where
        )

    def check(self, where: str) -> None:
        if self.optim.warmup_steps > self.total_steps:
            raise ValueError(
                f"{where}.optim.warmup_steps={self.optim.warmup_steps} must lie between 0 and "
                f"{where}.total_steps={self.total_steps}."
            )
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"{where}.microbatches={self.microbatches} does not cut {where}.batch_size="
                f"{self.batch_size} into equal parts."
            )
        steps = self.profile.steps
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= self.total_steps):
            raise ValueError(
                f"{where}.profile.steps={steps} must be (first, last) with 1 <= first <= last <= "
                f"{where}.total_steps={self.total_steps}, or () for no profile."
            )

    @property
    def preprocess(self) -> Preprocess:
        """What evaluation does to an image."""
        size = self.model.image.resolution
        return preprocess(self.eval.preprocess, size, self.image_mean, self.image_std)

    @classmethod
    def recorded(
        cls, values: Mapping[str, Any], where: str, preprocess: str | None = None
    ) -> "Config":
        """The configuration of a run, from its checkpoint's record; see `versions.complete`."""
        completed = versions.complete(values, where, preprocess)
        try:
            with types_alone():
                return super().read(completed, "config")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def record(self) -> dict[str, Any]:
        """As plain values of JSON, with the version that wrote it."""
        return {"version": versions.VERSION, **json.loads(json.dumps(self.as_dict()))}
