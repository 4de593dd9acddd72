"""The section `config.loss`."""

import math

from declip_jax.section import Section, at_least, between


class SupportSet(Section):
    size: int = at_least(1)
    neighbors: int = at_least(1)
    young_steps: int = at_least(1)


class LateInteraction(Section):
    tokens: int = at_least(0)
    mask_padding: bool
    all_views: bool


class Adaptive(Section):
    momentum: float = between(0, 1, edges="[)")
    gamma: float = at_least(0)


class Loss(Section):
    """What the methods' loss terms are computed with; configs/common.py tells of each field."""

    weights: dict[str, float]
    logit_scale_range: tuple[float, float]
    max_scale: float = at_least(0)
    temperature: float = between(0, math.inf, edges="()")
    contrast_masked: bool
    mlm_capacity: float = between(0, 1, edges="(]")
    support_set: SupportSet
    late_interaction: LateInteraction
    adaptive: Adaptive
    ring_threshold: int
    block: int = at_least(1)

    def check(self, where: str) -> None:
        if not self.logit_scale_range[0] <= self.logit_scale_range[1]:
            raise ValueError(
                f"{where}.logit_scale_range={self.logit_scale_range} must be (low, high), "
                "low <= high."
            )
        weights = self.weights.values()
        if not all(0 <= w < math.inf for w in weights) or (weights and not any(weights)):
            raise ValueError(
                f"{where}.weights={self.weights} must be at least 0, and not all of them 0."
            )
