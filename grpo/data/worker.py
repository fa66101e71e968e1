"""Loader processes of a rank."""

import os
import signal
import threading


def init_worker(worker_id: int) -> None:
    """Let only the parent end this worker.

    Ctrl-C, and the signals by which torchrun or a cluster asks a run to stop, reach the whole process group. A rank
    that still has to finish its step needs its workers for that.
    """
    parent = os.getppid()

    def end_when_parent_says() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_when_parent_says, daemon=True).start()


def worker_count(wanted: int) -> int:
    """Loader processes to start: no more than this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)
