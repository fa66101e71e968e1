"""Curves of runs, as numbers that the page's script draws."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo.observe.catalogue import FIRST, metric
from grpo.observe.history import LARGEST, MAX_POINTS, History, Point

DIGITS = 5  # of a value, and of the range of a curve, that a page has at least
FLAT = 1e-6  # a curve that moves by less than this share of its size is told as a number


class Chart(NamedTuple):
    """One metric of one or several runs on the same axes."""

    title: str
    unit: str
    number: int  # of its numbers in `ChartNumbers`
    lines: list[tuple[int, float]]  # number of the run, last value


class Constant(NamedTuple):
    """A metric that does not move."""

    title: str
    text: str


class Group(NamedTuple):
    """Curves of a run, or of several: those that are looked at first, the others, and what does not move."""

    heading: str
    first: list[Chart]
    rest: list[Chart]
    constants: list[Constant]


class ChartNumbers:
    """The numbers of a page's curves: `charts` have `lines` of a run, an entry of `steps`, and the values there.

    Most metrics of a run are of the same steps, which are there once.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[float, ...], int] = {}
        self._charts: list[dict[str, Any]] = []

    def add(self, title: str, unit: str, lines: dict[int, list[Point]]) -> Chart:
        """Number of a run -> its points."""
        values = [value for points in lines.values() for _, value in points]
        low, high = min(values), max(values)
        digits = DIGITS + max(0, math.floor(math.log10(max(abs(low), abs(high)) / (high - low))))
        numbers = []
        for run, points in lines.items():
            steps = self._steps.setdefault(tuple(step for step, _ in points), len(self._steps))
            shown = [float(f"{value:.{digits}g}") for _, value in points]
            numbers.append({"run": run, "steps": steps, "values": shown})
        self._charts.append({"title": title, "unit": unit, "lines": numbers})
        return Chart(title, unit, len(self._charts) - 1, [(run, points[-1][1]) for run, points in lines.items()])

    def as_json(self) -> dict[str, Any]:
        """What the script reads."""
        return {"steps": list(self._steps), "charts": self._charts}


def group(heading: str, runs: Sequence[History], numbers: ChartNumbers) -> Group:
    """The curves of all metrics that the runs have, of each run in which there are two values of it."""
    names = dict.fromkeys(name for run in runs for name in run.series)
    found = Group(heading, [], [], [])
    for name in [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]:
        title, unit, _ = metric(name)
        lines = {number: drawn(run.series[name].points()) for number, run in enumerate(runs) if name in run.series}
        moving = {number: points for number, points in lines.items() if len(points) > 1}
        values = [value for points in (moving or lines).values() for _, value in points]
        if not values:
            continue
        low, high = min(values), max(values)
        if high - low <= FLAT * max(abs(low), abs(high)):
            found.constants.append(Constant(title, f"{values[-1]:.4g} {unit}".rstrip()))
        elif moving:
            (found.first if name in FIRST else found.rest).append(numbers.add(title, unit, moving))
    return found


def drawn(points: Sequence[Point]) -> list[Point]:
    """At most 600 points, means over equal runs of neighbours, without those that no axis has room for."""
    size = max(1, -(-len(points) // MAX_POINTS))
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    means = ((run[-1][0], sum(value for _, value in run) / len(run)) for run in runs)
    return [point for point in means if all(abs(number) <= LARGEST for number in point)]
