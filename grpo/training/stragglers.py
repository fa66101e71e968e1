"""Ranks that are slower than the others, and so hold all of them up."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

FACTOR = 2.0  # of the median
PATIENCE = 10  # steps in a row before a rank is named
NOTICEABLE_SECONDS = 0.1

# Phases without collectives. In the others every rank takes as long as the slowest.
_OWN_PHASES = ("data", "encode", "decode", "reward")


class Slowest(NamedTuple):
    """What one step says about the ranks."""

    metrics: dict[str, float]
    warnings: list[str]


def own_work(times: Mapping[str, float]) -> float:
    """Seconds of a step that this rank has spent on work of its own, of the timer's phases."""
    return sum(times.get(f"seconds/{phase}", 0.0) for phase in _OWN_PHASES)


class Stragglers:
    """Compares the ranks step by step; every rank comes to the same result."""

    def __init__(self) -> None:
        self._suspect, self._in_a_row = -1, 0

    def look(self, seconds: Tensor) -> Slowest:
        """The slowest rank of a step and the median, by each rank's own work [ranks]; one rank compares to nobody."""
        if len(seconds) == 1:
            return Slowest({}, [])
        slowest, median = int(seconds.argmax()), float(seconds.quantile(0.5))
        most = float(seconds[slowest])
        is_slow = most > FACTOR * median and most - median > NOTICEABLE_SECONDS
        self._in_a_row = self._in_a_row + 1 if is_slow and slowest == self._suspect else int(is_slow)
        self._suspect = slowest
        metrics = {"ranks/slowest": float(slowest), "ranks/slowest_seconds": most, "ranks/median_seconds": median}
        if self._in_a_row != PATIENCE:
            return Slowest(metrics, [])
        told = f"rank {slowest} was the slowest {PATIENCE} times in a row: {most:.1f} s of loading, encoding, rewards; "
        return Slowest(metrics, [f"{told}the median is {median:.1f} s; look at its host"])
