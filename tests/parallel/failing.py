"""Run by torchrun on two ranks: fails in the way named on the command line."""

import os
import signal
import sys
from collections.abc import Sequence

from grpo.config import UserError
from grpo.parallel import all_reduce_sums, barrier, distributed, run_main


def main(arguments: Sequence[str]) -> None:
    how = arguments[0]
    if how == "rank 1 early" and os.environ["RANK"] == "1":
        raise UserError("only here")
    with distributed(60) as world:
        if how == "rank 1 alone":
            if world.rank == 1:
                raise UserError(["first line", "second line"])
            barrier()  # rank 1 never comes
        elif how == "killed once":
            first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            for _ in range(3):
                all_reduce_sums({"x": 1})
            if first_start and world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            total = all_reduce_sums({"rank": world.rank, "one": 1})
            print(f"rank {world.rank} restarted: {total}", flush=True)


if __name__ == "__main__":
    assert sys.argv[1:], "how to fail"
    run_main(main)
