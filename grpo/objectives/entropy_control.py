"""The weight of the entropy bonus, steered so that the policy's entropy stays near a target."""

import math

from torch import Tensor

from grpo.config import Objective

LARGEST_FACTOR = 100.0  # the weight stays within this factor of where it started, however long the target is missed


class EntropyControl:
    """An integral controller of the weight w of the entropy bonus.

    After each optimizer step, with h the mean token entropy as a share of log V, and d how far h is outside of
    target +- dead_band (positive where it is too low, 0 inside),

        w <- w exp(gain d),    within a factor of `LARGEST_FACTOR` of its start.

    Without a target the weight stays. (The run that this is for, LOO-FID's, published the start 2.2e-3, the target .78,
    the dead band .015 and the gain 3, but not the formula that joins them: this one is ours.)

    Args:
        objective: `entropy_weight`, `entropy_target`, `entropy_dead_band`, `entropy_gain`.
        vocab_size: V.
    """

    def __init__(self, objective: Objective, *, vocab_size: int) -> None:
        self.weight, self.objective = objective.entropy_weight, objective
        self._most = math.log(vocab_size)

    @property
    def steers(self) -> bool:
        """Whether there is a target."""
        return self.objective.entropy_target is not None

    def update(self, entropy: float) -> None:
        """Take the mean token entropy of an optimizer step, nats, the same on every rank. Not finite: no change."""
        target = self.objective.entropy_target
        if target is None or not math.isfinite(entropy):
            return
        error = target - entropy / self._most
        outside = math.copysign(max(0.0, abs(error) - self.objective.entropy_dead_band), error)
        most = 2 * math.log(LARGEST_FACTOR)  # from one bound to the other; exp of more might overflow
        self.weight = self._bounded(
            self.weight * math.exp(min(max(self.objective.entropy_gain * outside, -most), most))
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, float]:
        """The weight."""
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned; without a target the recipe's weight holds.

        Raises a ValueError for a weight that is no number.
        """
        if not self.steers:
            return
        if not math.isfinite(weight := float(state["weight"])):
            raise ValueError(f"the weight of the entropy bonus is {weight}")
        self.weight = self._bounded(weight)

    def _bounded(self, weight: float) -> float:
        start = self.objective.entropy_weight
        return min(max(weight, start / LARGEST_FACTOR), start * LARGEST_FACTOR)
