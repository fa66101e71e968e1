"""What a run says of optimizer steps that were skipped."""

import math
from collections.abc import Mapping, Sequence

from grpo.training.optimizer import GuardedOptimizer


class SkippedSteps:
    """Watches the optimizer's counters from now on, which a resumed run takes over from its checkpoint before."""

    def __init__(self, optimizer: GuardedOptimizer) -> None:
        self._optimizer = optimizer
        self._at_start = optimizer.steps, optimizer.skipped
        self._before = optimizer.skipped

    def step_begins(self) -> None:
        """From here on a skipped step is one of this step of the run."""
        self._before = self._optimizer.skipped

    def note(self, metrics: Mapping[str, float], causes: Sequence[str]) -> str | None:
        """That an optimizer step was skipped, if so, and what was not finite; `causes` are rewards."""
        if self._optimizer.skipped == self._before:
            return None
        seen = (name for name in ("reward_mean", "loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0)))
        return (
            f"{next(seen, 'a gradient')} is not finite, the optimizer step was skipped "
            f"({self._optimizer.skipped} so far, {self._optimizer.skipped_in_a_row} in a row)"
            + (f": {', '.join(causes)}" if causes else "")
        )

    def idle(self, causes: Sequence[str]) -> str | None:
        """That no optimizer step since the start was taken, if so; `causes` are the rewards that were not finite."""
        steps_before, skipped_before = self._at_start
        done = self._optimizer.steps - steps_before
        if not done or self._optimizer.skipped - skipped_before < done:
            return None
        named = f" ({', '.join(causes)})" if causes else ""
        return f"nothing was learned: all {done} optimizer steps had a non-finite reward, loss or gradient{named}"
