"""Files of a run's folder: metrics.jsonl, one object a line and one line a step; others, which appear whole."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

Metrics = dict[str, float | None]


def read_metrics(path: str | Path) -> list[Metrics]:
    """The lines of a metrics.jsonl, oldest first.

    A last line without its end is left out: the run that wrote it was killed at that moment, or is still writing.
    """
    text = Path(path).read_text() if Path(path).exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class MetricsFile:
    """Appends to a metrics.jsonl and keeps its steps unique.

    Args:
        path: the file; its folder exists.
        start_step: the step that the run continues from; lines after it, whose work is repeated, are dropped.
    """

    def __init__(self, path: str | Path, *, start_step: int = 0) -> None:
        self.path = Path(path)
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = self.path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the line of one step and flushes it. A value that is not finite is written as null (JSON has none)."""
        numbers = {name: float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._stream.write(json.dumps({"step": step, **line}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def write_atomically(path: Path, content: str) -> None:
    """Replaces `path` by `content` in one step: written beside it first, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
