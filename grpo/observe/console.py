"""Progress on a terminal as a bar, elsewhere as plain lines."""

import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")

HEADLINES = {
    "reward_mean": "reward",
    "loss": "loss",
    "accuracy": "accuracy",
    "kl": "KL",
    "entropy": "entropy",
    "aux_ce": "CE",
    "clip_fraction": "clipped",
    "zero_spread": "no spread",
    "codebook_usage": "codes used",
    "skipped_steps": "skipped",
    "images_per_second": "images/s",
}
"""The metrics that the console shows, in this order and under these names, as far as a job has them."""

LONG_STEP_SECONDS = 2.0

SHOWN_WHEN_NOT_ZERO = ("loss", "clip_fraction", "zero_spread", "skipped_steps")
"""Those that are 0 in most runs, or always: of one optimizer step a rollout the loss is, but for its other terms."""

ROUNDING = 1e-6  # less is 0


def headline(metrics: Mapping[str, float]) -> str:
    """The metrics of HEADLINES in one line, four digits each: `reward -0.8123  loss 0.0041  images/s 31.2`."""
    shown = {name: float(metrics[name]) for name in HEADLINES if name in metrics}
    idle = [name for name in SHOWN_WHEN_NOT_ZERO if abs(shown.get(name, 0.0)) < ROUNDING]
    return "  ".join(f"{HEADLINES[name]} {value:.4g}" for name, value in shown.items() if name not in idle)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")


class _Terminal(Console):
    """Standard error; when nobody reads it any more, nothing is written and nobody is disturbed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What is left in the stream's buffer is written when Python ends, which would fail too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


class _BarOverMetrics(Progress):
    """A bar with lines of text under it, so that all fits into a narrow terminal. It is drawn ten times a second."""

    lines: Callable[[], Iterable[str]] = tuple

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for line in self.lines():
            yield Text(line, no_wrap=True, overflow="ellipsis")


class ProgressDisplay:
    """The progress of one phase of `total` steps: a bar with the time left on a terminal, plain lines otherwise.

    Args:
        start: steps done before, by the run that this one continues.
        console: where to write; None is standard error.
        where: says how far the present step is: on a terminal, under the bar, from the first step on that takes longer
            than LONG_STEP_SECONDS.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        start: int = 0,
        console: Console | None = None,
        where: Callable[[], str] = str,
    ) -> None:
        self.description, self.total, self.start, self.where = description, total, start, where
        self.console = console or _Terminal(stderr=True)
        self._started = self._step_started = time.perf_counter()
        self._headline, self._steps_are_long = "", False
        self._bar: Progress | None = None
        if self.console.is_terminal:
            counts = BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()
            columns = "[bold]{task.description}", *counts, "left", TimeRemainingColumn(compact=True)
            self._bar = _BarOverMetrics(*columns, console=self.console, expand=True)
            self._bar.lines = self._lines
            self._task = self._bar.add_task(description, total=total, completed=start)
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float], *, line: bool) -> None:
        """Shows that `step` is done; without a bar prints it as a line, if `line`."""
        self._step_started, self._headline = time.perf_counter(), headline(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        elif line:
            self.message(self.line(step, metrics))

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """`train 20/100  reward -0.81  loss 0.004  1:32 left`: the step as plain text, time left by the mean pace."""
        seconds_left = (time.perf_counter() - self._started) / max(step - self.start, 1) * (self.total - step)
        parts = [f"{self.description} {step}/{self.total}", headline(metrics), f"{duration(seconds_left)} left"]
        return "  ".join(part for part in parts if part)

    def _lines(self) -> Iterator[str]:
        """The metrics, and how far the step is."""
        seconds = time.perf_counter() - self._step_started
        self._steps_are_long |= seconds > LONG_STEP_SECONDS
        yield from filter(None, [self._headline])
        if self._steps_are_long and (where := self.where()):
            yield f"{where}, {duration(seconds)} into the step"

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def progress(items: Collection[Item], description: str, *, show: bool = True) -> Iterator[Item]:
    """Yields `items` and shows how far it is: for loops without metrics, such as drawing or measuring images.

    Without a terminal there is a plain line every ten seconds. `show` False only passes the items on (ranks other than
    the main one).
    """
    if not show or not items:
        yield from items
        return
    display, last_line = ProgressDisplay(description, len(items)), time.perf_counter()
    try:
        for done, item in enumerate(items, 1):
            yield item
            due = done == len(items) or time.perf_counter() - last_line >= 10
            display.update(done, {}, line=due)
            if due:
                last_line = time.perf_counter()
    finally:
        display.close()
