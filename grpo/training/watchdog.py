"""A watch on progress: a process that stands still says where and ends, so that its launcher can start all again."""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

FAULT = 1  # exit code


class Watchdog:
    """Ends this process when nothing has happened in it for too long.

    A collective that another rank does not join ends by its own timeout. What no collective waits for is seen here:
    data loading that hangs on every rank, a file system that does not answer.

    Args:
        seconds: how long a process may stand still.
        rank: of this process, for the message.
        heartbeat: a file to write time, step and phase into, every few seconds; None on ranks that write nothing.
        end: ends the process with this code; not through `sys.exit`, which a thread that hangs would hold up.
    """

    def __init__(
        self, seconds: float, *, rank: int, heartbeat: Path | None = None, end: Callable[[int], None] = os._exit
    ) -> None:
        self.seconds, self.rank, self.heartbeat, self.end = seconds, rank, heartbeat, end
        self.step, self.phase = 0, "start"
        self._last = time.monotonic()
        self._stopped = threading.Event()

    def start(self, until: ExitStack) -> None:
        """Watch until the stack closes; a last beat says `finished`, or `ended` with the error that closed it."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

        def end(kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
            self._stopped.set()
            thread.join(timeout=5)  # it may be writing
            if not thread.is_alive():
                self._beat(finished=True) if kind is None else self._beat(ended=f"{kind.__name__}: {error}")

        until.push(end)
        self._last = time.monotonic()
        thread.start()

    def step_begins(self, step: int) -> None:
        """Progress: another step."""
        self._last, self.step = time.monotonic(), step

    def phase_begins(self, phase: str | None) -> None:
        """Progress: a phase of the step begins, or ends with None."""
        self._last, self.phase = time.monotonic(), phase or "between phases"

    def _watch(self) -> None:
        pause = min(5.0, self.seconds / 10)
        while not self._stopped.wait(pause):
            self._beat()
            still = time.monotonic() - self._last
            if still > self.seconds:
                self._give_up(still)

    def _beat(self, **end: object) -> None:
        if self.heartbeat is None:
            return
        beat = {"time": time.time(), "step": self.step, "phase": self.phase}
        beat["still_for_seconds"] = round(time.monotonic() - self._last, 1)
        beat |= end
        with suppress(OSError):  # a full disk is told by what needs it
            temporary = self.heartbeat.with_name(f".{self.heartbeat.name}")
            temporary.write_text(json.dumps(beat) + "\n")
            temporary.replace(self.heartbeat)

    def _give_up(self, still: float) -> None:
        line = (
            f"Rank {self.rank} on {os.uname().nodename} has stood still for {still:.0f} s in step {self.step}, phase "
            f"{self.phase}, longer than parallel.timeout: it ends, so that the launcher can start all ranks again. "
            "Where its threads are:\n"
        )
        with suppress(OSError, ValueError):
            sys.stderr.write(line)
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        self.end(FAULT)
