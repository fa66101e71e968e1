"""The metrics of a run in bounded memory, however long it is."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Self

from grpo.observe.files import metric_lines, step_of

MAX_POINTS = 600
LARGEST = 1e100  # in size; what is beyond has no sum, and no axis has room for it with anything else
END_SHARE = 0.1  # of the steps, whose mean stands for the start or the end of a run

Point = tuple[float, float]  # step and value


class Series:
    """One metric over the steps: means over equal runs of neighbours, twice as long whenever there are too many.

    Attributes:
        total: sum of all values.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._points: list[Point] = []
        self._stride, self._pending = 1, (0.0, 0.0, 0)  # values of a point; last step, sum and count of the next one

    def add(self, step: float, value: float) -> None:
        """The value of one more step."""
        self.total += value
        _, total, count = self._pending
        self._pending = step, total + value, count + 1
        if count + 1 == self._stride:
            self._points.append((step, (total + value) / self._stride))
            self._pending = 0.0, 0.0, 0
        if len(self._points) == 2 * MAX_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(later[0], (first[1] + later[1]) / 2) for first, later in pairs]
            self._stride *= 2

    def points(self) -> list[Point]:
        """At most 2 x 600 of them, up to the last step."""
        step, total, count = self._pending
        return [*self._points, (step, total / count)] if count else list(self._points)

    def ends(self) -> tuple[float, float]:
        """Means over the first and over the last tenth of the steps; there is at least one."""
        values = [value for _, value in self.points()]
        weights = [self._stride] * len(self._points) + [self._pending[2]] * bool(self._pending[2])
        count = max(1, round(END_SHARE * len(values)))
        return fmean(values[:count], weights[:count]), fmean(values[-count:], weights[-count:])


class History:
    """The series of a run by the name of the metric, in the order in which they appeared."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """That of a metrics.jsonl."""
        history = cls()
        for line in metric_lines(path):
            history.add(step_of(line), line)
        return history

    def add(self, step: float, metrics: Mapping[str, float | None]) -> None:
        """One more step; what is no number, or too large a one, is left out."""
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float) and abs(value) <= LARGEST:
                self.series.setdefault(name, Series()).add(step, value)
