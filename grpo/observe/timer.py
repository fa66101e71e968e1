"""Seconds per phase of a step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Times the phases of a step without holding up the GPU.

    On a GPU each phase is bracketed by CUDA events, so a phase costs two records and the host waits only in `read`; on
    a CPU by `perf_counter`. A phase entered several times adds up; one inside another is not counted to the outer one.

        timer = PhaseTimer(device)
        with timer("rollout"):
            ...
        metrics |= timer.read()      # {"seconds/rollout": 0.81, "seconds/step": 1.93}
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._spans: dict[str, list[tuple]] = defaultdict(list)
        self._inside: dict[str, list[tuple]] = defaultdict(list)  # what other phases took within a phase
        self._open: list[str] = []
        self._step_start = time.perf_counter()

    def _mark(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts what runs inside to `phase`."""
        self._open.append(phase)
        start = self._mark()
        yield
        span = start, self._mark()
        self._spans[self._open.pop()].append(span)
        if self._open:
            self._inside[self._open[-1]].append(span)

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last read, and of all (`seconds/step`, wall time); waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = {
            f"seconds/{phase}": sum(map(self._length, spans)) - sum(map(self._length, self._inside[phase]))
            for phase, spans in self._spans.items()
        }
        now = time.perf_counter()
        seconds["seconds/step"] = now - self._step_start
        self._step_start = now
        self._spans.clear()
        self._inside.clear()
        return seconds

    def _length(self, span: tuple) -> float:
        start, end = span
        return start.elapsed_time(end) / 1000 if self._on_gpu else end - start
