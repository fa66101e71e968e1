"""Run by torchrun on two ranks that take themselves for two hosts: a checkpoint by way of FOLDER/store, and back."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from grpo.parallel import distributed
from tests.checkpoint.training import managed, same, save, start, train, whole_state


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed(60) as world:
        os.environ["GROUP_RANK"] = str(world.rank)
        world = replace(world, local_rank=0, local_size=1)
        training, again = start(world), start(world)
        train(world, training, range(2))
        with managed(f"file://{folder}/store", world, stage=folder / "stage", sharded=False) as manager:
            save(manager, training, 2)
            path = manager.resume_point()
            assert path.parent == folder / "stage" / str(world.rank)
            manager.load(path, model=again[0], optimizer=again[1])
        states = whole_state(training), whole_state(again)
        assert not world.is_main or same(*states)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
