"""One writer at a time in a run's folder."""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from grpo.config import UserError

LOCK_NAME = ".lock"
_POLL_SECONDS = 0.2


class RunLock:
    """Held by the main rank while it may write into the run's folder; the system frees it when the process ends.

    Ranks that outlive a killed launcher finish their step and write a checkpoint: the next start waits for them. Locks
    are POSIX record locks, which data workers do not inherit and network file systems know.

    Args:
        run_dir: the run's folder, made if need be.
        wait_seconds: how long to wait for another holder.

    Raises:
        UserError: another process holds it still, or the folder cannot be written.
    """

    def __init__(self, run_dir: Path, *, wait_seconds: float) -> None:
        path = run_dir / LOCK_NAME
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            problem = f"cannot write to the run's folder {run_dir}: {error.strerror}; set metrics.run_dir"
            raise UserError(problem) from error
        deadline = time.monotonic() + wait_seconds
        while not _taken(self._file):
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{run_dir} is being written by another run ({_holder(path)}): end that one, or give this one "
                    "another metrics.run_dir"
                )
            time.sleep(_POLL_SECONDS)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def close(self) -> None:
        """Free the folder."""
        self._file.close()


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks: the run goes on unprotected rather than not at all.
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "unknown"
    except OSError:
        return "unknown"
