"""From a job to an exit code: who reports an error, how the process ends."""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from grpo.config import TransientError, UserError
from grpo.parallel.distributed import environment_rank, run_store
from grpo.restarts import MISTAKE, is_pointless, note_mistake

_REPORTED = "error-reported"
_PRINTED = "error-printed"
_ALONE_SECONDS = 4.0  # longer than a launcher takes to end the ranks of its host
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LOST_CONTACT = (
    "Rank {rank} lost another rank in a collective: that one was killed, has failed (it says why itself), or did not "
    "come within parallel.timeout. Nothing before the newest checkpoint is lost: torchrun --max-restarts, or the same "
    "command once more, goes on from it."
)


def run_main(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a job on the command line without the program's name, and end the process.

    Exit codes: 0 done; 2 a user's mistake, or memory or disk space that ran out, told in plain lines by exactly one
    rank; 130 interrupted; 143 stopped by SIGTERM, with a checkpoint; 1 anything else, with its traceback. A process
    that fails leaves at once, without waiting for other ranks: they see its connections close, or torchrun ends them.
    Where torchrun starts them again after a mistake that no restart mends, they end with 2 and say nothing.
    """
    if is_pointless():
        os._exit(MISTAKE)
    try:
        main(sys.argv[1:])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        code = 130
    except UserError as error:
        if not isinstance(error, TransientError):
            note_mistake()
        _report(error.problems)
        code = MISTAKE
    except BaseException as error:  # failures of torch.distributed.checkpoint are no `Exception`
        code = 2
        if advice := _advice(error):
            _report([advice])
        elif not _another_rank_reported():  # else this rank only lost its partner in a collective
            traceback.print_exc()
            text = str(error)  # neither gloo nor torch has an exception for it alone
            lost_contact = "Connection closed by peer" in text or "gloo" in text
            if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and lost_contact):
                print(_LOST_CONTACT.format(rank=environment_rank()), file=sys.stderr)
            code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # nobody reads any more, as in `grpo compare ... | head`; the exit flushes once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):  # a user's code has closed it
            continue
    if code == 0:
        sys.exit(0)
    os._exit(code)  # a regular exit would join writer threads that wait for ranks which are gone


def _report(lines: Sequence[str]) -> None:
    """Print on the first rank that gets here; the others leave once the lines are out.

    An error may be local to a rank (a file that only it reads), so rank 0 cannot always be the one.
    """
    rank = str(environment_rank())
    if (store := run_store()) is None:
        _report_alone(lines)
        return
    try:
        if store.compare_set(_REPORTED, "", rank).decode() == rank:
            print(*lines, sep="\n", file=sys.stderr, flush=True)
            store.set(_PRINTED, "")
        else:
            store.wait([_PRINTED], timedelta(seconds=5))
    except RuntimeError:  # the store went away together with the rank or the launcher that hosts it
        if rank == "0":
            print(*lines, sep="\n", file=sys.stderr, flush=True)


def _report_alone(lines: Sequence[str]) -> None:
    """Before the group is up nothing can be agreed on: rank 0 speaks for all who have the same problem.

    Then the launcher ends the others at once. Who is still there after some seconds has a problem of its own.
    """
    rank = environment_rank()
    if rank:
        time.sleep(_ALONE_SECONDS)
        lines = [f"rank {rank} on {os.uname().nodename}: {line}" for line in lines]
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def _another_rank_reported() -> bool:
    with suppress(RuntimeError):  # the store may have gone with the rank or the launcher that hosts it
        return (store := run_store()) is not None and store.check([_REPORTED])
    return False


def _advice(error: BaseException) -> str | None:
    """What to do where memory or disk space has run out; None for any other error."""
    rank = f"Rank {environment_rank()}"
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError):
        detail = str(error).partition("\n")[0].partition(". GPU")[0]
        return (
            f"{rank} ran out of memory ({detail or 'host memory'}): lower training.micro_batch_size, "
            'rollout.max_rows or reward.batch_size, or set activation_checkpoint.mode = "full".'
        )
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return (
            f"{rank} could not write {error.filename or 'a file of the run'} ({error.strerror}): make room there and "
            "start again; the run goes on from its newest checkpoint."
        )
    return None
