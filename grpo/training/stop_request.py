"""A run that is asked to stop: SIGTERM, or a launcher that is gone."""

import os
import signal
import threading
from contextlib import ExitStack


class StopRequest:
    """Notes that this process was asked to stop, for the run to look at between steps.

    SIGTERM is what a cluster sends before it takes a machine away, and what torchrun sends to the ranks that are left
    when one has died. It therefore ends nothing by itself: after the step, all ranks agree (`TrainingRun`), and where
    one is gone there is no agreement but a lost connection.

    A torchrun that was killed outright sends nothing. Its ranks would train on, beside the ones of the next start; a
    rank notices that its parent has changed.
    """

    def __init__(self) -> None:
        self._terminated = False
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def listen(self, until: ExitStack) -> None:
        """Take over SIGTERM; does nothing outside of the main thread, where Python allows no handlers."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGTERM, self._note)
            until.callback(signal.signal, signal.SIGTERM, previous)

    @property
    def reason(self) -> str | None:
        """Why to stop; None while there is no reason."""
        if self._terminated:
            return "SIGTERM"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the launcher is gone"
        return None

    def _note(self, *signal_and_frame: object) -> None:
        self._terminated = True
