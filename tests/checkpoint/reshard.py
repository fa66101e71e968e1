"""Run by torchrun on two ranks, on a folder that holds `one/`, the checkpoint of one rank, and its state `one.pth`.

Checks 1 -> 2 element by element, then leaves `two/` and `two.pth` for 2 -> 1.
"""

import sys
from pathlib import Path

import torch

from grpo.parallel import distributed
from tests.checkpoint.training import Extra, managed, same, save, start, train, whole_state


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed(60) as world:
        training = start(world)
        with managed(folder / "one", world) as manager:
            found = Extra(training[0], 0.0)
            path = manager.resume_point()
            manager.load(path, model=training[0], optimizer=training[1], extra={"mean": found})
            assert found.equals(Extra(training[0], 3.0))
        state = whole_state(training)
        if world.is_main:
            assert same(state, torch.load(folder / "one.pth"))

        with managed(folder / "two", world, sharded=False, async_save=True) as manager:
            for step in range(3, 6):
                train(world, training, range(step, step + 1))
                save(manager, training, step, mean=Extra(training[0], float(step)))
                state = whole_state(training)
                norms = train(world, training, range(step + 1, step + 3))  # while it is being written
            again = start(world, data_parallel="hsdp", shard_size=1)
            found, path = Extra(again[0], 0.0), manager.resume_point()
            manager.load(path, model=again[0], optimizer=again[1], extra={"mean": found})
            assert found.equals(Extra(again[0], 5.0))
            loaded = whole_state(again)
            if world.is_main:
                assert same(loaded, state)
                torch.save(state, folder / "two.pth")
            same_layout = start(world)
            manager.load(path, model=same_layout[0], optimizer=same_layout[1], extra={"mean": Extra(same_layout[0], 0)})
            assert train(world, same_layout, range(6, 8)) == norms


if __name__ == "__main__":
    main(Path(sys.argv[1]))
