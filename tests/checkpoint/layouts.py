"""Run by torchrun: loads checkpoints in every layout of its ranks, checks each, leaves others.

    layouts.py FOLDER SUFFIX NAME...

`<folder>/<name>.pth` is the whole state that must come out of `<folder>/<name>/`, element by element. The state of
the first name is then trained for a step and saved in two layouts, `fsdp<suffix>` and `hsdp<suffix>`, with their .pth.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from grpo.parallel import distributed
from tests.checkpoint.training import managed, same, save, start, train, whole_state

LAYOUTS = {"fsdp": {}, "hsdp": {"data_parallel": "hsdp", "shard_size": 2}, "sdp": {"data_parallel": "sdp"},
           "replicas": {"data_parallel": "hsdp", "shard_size": 1}}  # fmt: skip


def main(folder: Path, suffix: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    with distributed(60) as world:
        for name, (layout, how) in itertools.product(names, LAYOUTS.items()):
            training = start(world, **how)
            with managed(folder / name, world) as manager:
                manager.load(manager.resume_point(), model=training[0], optimizer=training[1])
            state = whole_state(training)
            assert not world.is_main or same(state, torch.load(folder / f"{name}.pth")), (name, layout)
            if name != names[0] or layout not in ("fsdp", "hsdp"):
                continue
            train(world, training, range(20, 21))
            with managed(folder / f"{layout}{suffix}", world) as manager:
                save(manager, training, 21)
            state = whole_state(training)
            if world.is_main:
                torch.save(state, folder / f"{layout}{suffix}.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
