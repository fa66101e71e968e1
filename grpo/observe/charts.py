"""Curves of a run as inline SVG."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.observe.history import MAX_POINTS, Point, Series

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 24
SMOOTHING_WINDOW = 0.03


@dataclass(frozen=True)
class Curve:
    """One metric over the steps: what the report's template draws and what its script reads on hovering."""

    title: str
    points: list[Point]  # (step, value)
    pixels: list[Point]  # of the points
    smooth_pixels: list[Point]  # of their running mean
    x_ticks: list[tuple[float, str]]  # (pixel, label)
    y_ticks: list[tuple[float, str]]
    hover_data: str  # JSON of [pixel x, pixel y, text] of each point


def curve(title: str, series: Series) -> Curve | None:
    """The curve of a metric; None if it has fewer than two values."""
    points = _thin(series.points())
    if len(points) < 2:
        return None
    axes, smooth = _Axes(points), _smoothed(points)
    return Curve(
        title=title,
        points=points,
        pixels=[axes.place(point) for point in points],
        hover_data=json.dumps([[*axes.place((x, y)), f"step {x:.0f}: {y:.4g}"] for x, y in points]),
        smooth_pixels=[axes.place(point) for point in smooth],
        x_ticks=axes.x_ticks,
        y_ticks=axes.y_ticks,
    )


@dataclass(frozen=True)
class Overlay:
    """One metric of several runs over the steps, on the same axes."""

    title: str
    lines: list[tuple[int, list[Point], list[Point], float]]  # number of the run, pixels, those smoothed, last value
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def overlay(title: str, runs: Sequence[Series | None]) -> Overlay | None:
    """The curves of a metric of several runs; None where all its values are equal or each run has fewer than two."""
    found = {number: _thin(series.points()) for number, series in enumerate(runs) if series is not None}
    found = {number: points for number, points in found.items() if len(points) >= 2}
    if len({value for points in found.values() for _, value in points}) < 2:
        return None
    axes = _Axes([point for points in found.values() for point in points])
    lines = []
    for number, points in found.items():
        pixels = [[axes.place(point) for point in line] for line in (points, _smoothed(points))]
        lines.append((number, *pixels, points[-1][1]))
    return Overlay(title, lines, axes.x_ticks, axes.y_ticks)


class _Axes:
    """Where points belong in the picture, and the marks along its sides."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._x = x_low, x_high = _limits([x for x, _ in points])
        self._y = y_low, y_high = _limits([y for _, y in points], margin=0.06)
        whole = (tick for tick in ticks(x_low, x_high) if tick == int(tick))
        self.x_ticks = [(self.place((tick, y_low))[0], f"{tick:g}") for tick in whole]
        self.y_ticks = [(self.place((x_low, tick))[1], f"{tick:.6g}") for tick in ticks(y_low, y_high)]

    def place(self, point: Point) -> Point:
        (x_low, x_high), (y_low, y_high) = self._x, self._y
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)


def _smoothed(points: list[Point]) -> list[Point]:
    return _running_mean(points, window=max(1, round(len(points) * SMOOTHING_WINDOW)))


def ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((multiple * power for multiple in (1, 2, 5, 10)), key=lambda candidate: abs(candidate - rough))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _limits(values: Sequence[float], *, margin: float = 0.0) -> tuple[float, float]:
    """The range of the values, widened by `margin` of it; of one value, something around it."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(low) / 10 or 1.0
        return low - spread, high + spread
    return low - margin * (high - low), high + margin * (high - low)


def _thin(points: list[Point]) -> list[Point]:
    """At most 600 points: means over equal runs of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]


def _running_mean(points: list[Point], *, window: int) -> list[Point]:
    """Mean of each point and the `window - 1` before it."""
    values = [value for _, value in points]
    means = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]
