"""One writer at a time in a run's folder."""

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO

from grpo.config import TransientError, UserError

logger = logging.getLogger(__name__)


def lock_folder(folder: Path, *, wait_seconds: float) -> IO[str]:
    """Make a folder of a run and keep others from writing into it, until the returned file is closed or the process
    ends.

    Ranks that outlive a killed launcher finish their step and write a checkpoint: the next start waits for them. Locks
    are POSIX record locks, which data workers do not inherit and network file systems know.

    Raises:
        UserError: after so many seconds another process holds it still, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"cannot write to the run's folder {folder}: {error.strerror}; set metrics.run_dir") from error
    deadline, told = time.monotonic() + wait_seconds, False
    while not _taken(file):
        file.seek(0)
        busy = f"{folder} is being written by another run ({file.read().strip() or 'unknown'})"
        if time.monotonic() >= deadline:
            raise TransientError(f"{busy}: end that one, or give this one another metrics.run_dir")
        if not told:
            logger.warning("%s: waiting up to %.0f s for its end", busy, wait_seconds)
        told = True
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks: the run goes on unprotected rather than not at all
    return True
