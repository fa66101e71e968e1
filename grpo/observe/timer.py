"""Seconds per phase of a step."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch


class PhaseTimer:
    """Times the phases of a step without holding up the GPU.

    On a GPU a mark is a CUDA event, so a phase costs two records and the host waits only in `read`; on a CPU it is
    `perf_counter`. A phase entered several times adds up; one inside another is not counted to the outer one,
    but "reward/clip" is counted to "reward" too.

        timer = PhaseTimer(device)
        with timer("rollout"):
            ...
        metrics |= timer.read()      # {"seconds/rollout": 0.81, "seconds/step": 1.93}
    """

    def __init__(
        self, device: torch.device | str = "cpu", *, on_phase: Callable[[str | None], None] = lambda phase: None
    ) -> None:
        self._on_phase = on_phase
        self._on_gpu = torch.device(device).type == "cuda"
        self._phase: str | None = None
        self._marks: list[tuple[str | None, Any]] = []  # the phase that begins, and when: a CUDA event, or seconds
        self._step_start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts what runs inside to `phase`, by which name a profiler's trace has it too."""
        outer = self._phase
        self._begin(phase)
        with torch.profiler.record_function(f"phase/{phase}"):
            yield
        self._begin(outer)

    def _begin(self, phase: str | None) -> None:
        self._on_phase(phase)
        self._phase = phase
        if not self._on_gpu:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last read, and of all (`seconds/step`, wall time); waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in pairwise(self._marks):
            if phase is not None:
                duration = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
                for name in {phase, phase.partition("/")[0]}:
                    seconds[f"seconds/{name}"] += duration
        self._marks = self._marks[-1:]
        now = time.perf_counter()
        seconds["seconds/step"], self._step_start = now - self._step_start, now
        return dict(seconds)
