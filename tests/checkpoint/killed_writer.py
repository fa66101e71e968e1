"""Run alone: writes checkpoint 1 into the folder on the command line, and is killed while it writes checkpoint 2."""

import os
import signal
import sys
from pathlib import Path

from grpo.parallel import distributed
from tests.checkpoint.training import managed, save, start


def main(folder: Path) -> None:
    with distributed(60) as world, managed(folder, world, async_save=True) as manager:
        training = start(world)
        save(manager, training, 1)
        manager.wait()
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        save(manager, training, 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
