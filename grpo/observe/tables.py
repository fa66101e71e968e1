"""Tables of numbers that are to be compared, on pages and on the terminal."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from grpo.observe.catalogue import Better

MOST_DECIMALS, SIGNIFICANT, LARGEST = 6, 3, 1e6


class Cell(NamedTuple):
    """A number, or another text, and how it stands beside the first of its kind."""

    text: str
    change: str = ""  # from the first; empty where there is none
    improved: bool | None = None  # whether that is for the better; None where nobody can say
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text} ({self.change})" if self.change else self.text


class Table(NamedTuple):
    """A row for each label, of as many cells as there are columns."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    note: str = ""
    verdict: str = ""  # in a sentence, what the table says


def compared(values: Sequence[float | None], *, better: Better = "") -> list[Cell]:
    """Values of one metric with their differences to the first, all with as many decimals as tell them apart.

    The best are marked where the metric has a better side and not all are equal. None and NaN are shown as such.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    write, sign = _writer(known), {"higher": 1, "lower": -1, "": 0}[better]
    best = max((sign * value for value in known), default=None) if sign and len(set(known)) > 1 else None
    cells, first = [], values[0] if values else None
    for value in values:
        if value is None or not math.isfinite(value):
            cells.append(Cell("-" if value is None else str(value)))
        elif first is None or not math.isfinite(first) or value == first:
            cells.append(Cell(write(value, ""), best=sign * value == best))
        else:
            improved = sign * (value - first) > 0 if sign else None
            cells.append(Cell(write(value, ""), write(value - first, "+"), improved, sign * value == best))
    return cells


def with_interval(mean: float, half: float) -> str:
    """A mean with half of its interval, of two digits, both with as many decimals."""
    if not half or not math.isfinite(half):
        return f"{mean:.4g} ± {half:g}"
    decimals = 1 - math.floor(math.log10(half))
    if decimals > MOST_DECIMALS or abs(mean) + half >= LARGEST:
        return f"{mean:.4g} ± {half:.2g}"
    return f"{mean:.{max(decimals, 0)}f} ± {half:.{max(decimals, 0)}f}"


@dataclass(frozen=True)
class Results:
    """Metrics of several models, or of one at several times; the first is what the others are compared with.

    values  name of a metric -> its value of each
    better  name of a metric -> which way is better, where one is
    """

    names: Sequence[str]
    values: Mapping[str, Sequence[float | None]]
    better: Mapping[str, Better]

    def cells(self) -> dict[str, list[Cell]]:
        """Name of a metric -> cells, one for each of `names`."""
        return {name: compared(row, better=self.better.get(name, "")) for name, row in self.values.items()}

    def by_name(self, title: str, *, note: str = "") -> Table:
        """A row for each of `names`, a column for each metric."""
        cells = self.cells()
        rows = [(name, [row[index] for row in cells.values()]) for index, name in enumerate(self.names)]
        return Table(title, list(cells), rows, note, self.verdict())

    def by_metric(self, title: str, *, note: str = "") -> Table:
        """A row for each metric, a column for each of `names`."""
        return Table(title, list(self.names), list(self.cells().items()), note, self.verdict())

    def verdict(self) -> str:
        """The last beside the first, in a sentence; empty where there is nothing to say."""
        said: dict[bool, list[str]] = {True: [], False: []}
        for name, row in self.cells().items():
            if row[-1].improved is not None:
                said[row[-1].improved].append(f"{name} ({row[0].text} to {row[-1].text})")
        parts = [
            f"{word} in {', '.join(said[good])}" for good, word in ((True, "better"), (False, "worse")) if said[good]
        ]
        after, before = self.names[-1], self.names[0]
        return f"{after[:1].upper()}{after[1:]} against {before}: {'; '.join(parts)}." if parts else ""


def _writer(values: Sequence[float]) -> Callable[[float, str], str]:
    """(value, sign) -> text: three digits of the largest value, more where the values differ by less, two at most."""
    largest = max(map(abs, values), default=0.0)
    spread = max(values, default=0.0) - min(values, default=0.0)
    if largest >= LARGEST or not math.isfinite(spread):
        return lambda value, sign: f"{value:{sign}.3g}"
    if all(value == int(value) for value in values):
        return lambda value, sign: f"{value:{sign}.0f}"
    decimals = wanted = SIGNIFICANT - 1 - math.floor(math.log10(largest))
    if spread:
        decimals = min(max(wanted, 1 - math.floor(math.log10(spread))), wanted + 2)
    if decimals > MOST_DECIMALS:
        return lambda value, sign: f"{value:{sign}.3g}"
    return lambda value, sign: f"{value:{sign}.{max(decimals, 0)}f}"
