"""Run by torchrun: loads the checkpoint `<folder>/<name>/` in every layout of its ranks, checks each, leaves others.

    layouts.py FOLDER NAME [SUFFIX]

`<folder>/<name>.pth` is the whole state that must come out, element by element. With a suffix, the state is then
trained for a step and saved in both layouts, as `fsdp<suffix>` and `hsdp<suffix>`, each with its .pth.
"""

import sys
from pathlib import Path

import torch

from grpo.parallel import distributed
from tests.checkpoint.training import managed, same, save, start, train, whole_state

LAYOUTS = {"fsdp": {}, "hsdp": {"data_parallel": "hsdp", "shard_size": 2}, "sdp": {"data_parallel": "sdp"},
           "replicas": {"data_parallel": "hsdp", "shard_size": 1}}  # fmt: skip


def main(folder: Path, name: str, suffix: str | None) -> None:
    torch.set_num_threads(1)
    with distributed(60) as world:
        expected = torch.load(folder / f"{name}.pth")
        for layout, how in LAYOUTS.items():
            training = start(world, **how)
            with managed(folder / name, world) as manager:
                manager.load(manager.resume_point(), model=training[0], optimizer=training[1])
            state = whole_state(training)
            assert not world.is_main or same(state, expected), layout
            if suffix is None or layout not in ("fsdp", "hsdp"):
                continue
            train(world, training, range(20, 21))
            with managed(folder / f"{layout}{suffix}", world) as manager:
                save(manager, training, 21)
            state = whole_state(training)
            if world.is_main:
                torch.save(state, folder / f"{layout}{suffix}.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
