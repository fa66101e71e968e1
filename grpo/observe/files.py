"""Files of a run's folder: metrics.jsonl, one object a line and one line a step; others, which appear whole."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from grpo.config import read_text, reading

Metrics = dict[str, float | None]  # of a step, with its number as `step`


def metric_lines(path: str | Path) -> Iterator[Metrics]:
    """The lines of a metrics.jsonl, oldest first, one after the other: a long run's do not fit into memory.

    A last line without its end is left out: the run that wrote it was killed at that moment, or is still writing. So is
    a line that is not one of a step, wherever it came from.
    """
    if not Path(path).is_file():  # a pipe has no end
        return
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith("\n") and (metrics := _step_line(line)) is not None:
                yield metrics


def read_metrics(path: str | Path) -> list[Metrics]:
    """All of `metric_lines`."""
    return list(metric_lines(path))


def step_of(metrics: Metrics) -> float:
    """The number of the step of a line."""
    step = metrics["step"]
    assert step is not None, "a line has one"
    return step


def _step_line(line: str) -> Metrics | None:
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_step = isinstance(metrics, dict) and type(metrics.get("step")) is int
    return metrics if is_step and all(map(_is_number, metrics.values())) else None


def _is_number(value: object) -> bool:
    """Whether it is a float or null; whole numbers in JSON have no end."""
    if value is None:
        return True
    # By the exact type: a truth value is no number here.
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max


def judge_records(folder: str | Path) -> list[dict[str, float]]:
    """What a run's judge has said, the oldest first: the numbers of the run's judge.json, nothing where there is none.

    Raises a UserError: the file is damaged.
    """
    path = Path(folder) / "judge.json"
    with reading(f"{path} cannot be read"):
        records = json.loads(read_text(path)) if path.is_file() else []
        numbers = [
            {name: value for name, value in record.items() if value is not None and _is_number(value)}
            for record in records
        ]
    return [record for record in numbers if "step" in record]


class MetricsFile:
    """Appends to a metrics.jsonl and keeps its steps unique.

    Args:
        path: the file; its folder exists.
        start_step: the step that the run continues from; lines after it, whose work is repeated, are dropped.
    """

    def __init__(self, path: str | Path, *, start_step: int = 0) -> None:
        self.path = Path(path)
        kept = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with kept.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in metric_lines(self.path) if step_of(line) <= start_step)
        kept.replace(self.path)
        self._stream = self.path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the line of one step and flushes it."""
        self._stream.write(json.dumps({"step": step, **finite(metrics)}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics as JSON can have them: None for what is not finite."""
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def write_atomically(path: Path, content: str) -> None:
    """Replaces `path` by `content` in one step: written beside it first, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # in a folder from elsewhere it may be a link to anything
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
