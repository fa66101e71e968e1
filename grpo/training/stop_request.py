"""A run that is asked to stop: by a signal, or because its launcher is gone."""

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAME_SECONDS = 2.0  # Ctrl-C reaches a rank from the terminal and again from torchrun, which passes it on


class StopRequest:
    """Notes that this process was asked to stop, for the run to look at between steps.

    SIGTERM is what a cluster sends before it takes a machine away, and what torchrun sends to the ranks that are left
    when one has died; SIGUSR1 is how SLURM warns; SIGINT is Ctrl-C, SIGHUP a terminal that was closed. None of them
    ends anything by itself: after the step, all ranks agree (`TrainingRun`), and where one is gone there is no
    agreement but a lost connection. A second request ends the process at once, unless it comes so soon that it may be
    the echo of the first: by torchrun, or by a shell whose terminal was closed.

    A torchrun that was killed outright sends nothing. Its ranks would train on, beside the ones of the next start; a
    rank notices that its parent has changed.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.speaks = speaks  # whether to tell the user; one rank is enough
        self.signal: signal.Signals | None = None
        self._first = 0.0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def listen(self, until: ExitStack) -> None:
        """Take over the signals; does nothing outside of the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if (previous := signal.getsignal(number)) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._note)
                until.callback(signal.signal, number, previous)

    @property
    def reason(self) -> str | None:
        """Why to stop; None while there is no reason."""
        if self.signal is not None:
            return self.signal.name
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the launcher is gone"
        return None

    def _note(self, number: int, frame: object) -> None:
        received, now = signal.Signals(number), time.monotonic()
        if self.signal is not None and now - self._first > SAME_SECONDS:
            self._say(f"{received.name} again: ends now; the run goes on from its newest checkpoint")
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._first = received, now
            again = f"once more, after {SAME_SECONDS:.0f} s, ends it at once"
            self._say(f"{received.name}: stops after this step, with a checkpoint; {again}")

    def _say(self, text: str) -> None:
        if self.speaks:
            with suppress(OSError, ValueError):  # not through a logger, whose lock this thread may hold
                os.write(sys.__stderr__.fileno(), f"\n{text}\n".encode())
