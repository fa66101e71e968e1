"""Run by torchrun on two ranks: `grpo train` to the end, and in two halves.

    resume_on_two_ranks.py FOLDER FLAG...

Leaves the runs `whole` and `broken` of two steps each in the folder.
"""

import sys
from pathlib import Path

import torch

from grpo.config import GRPORecipe, load_recipe
from grpo.jobs.train_grpo import train
from grpo.parallel import distributed


def main(folder: Path, flags: list[str]) -> None:
    torch.set_num_threads(1)
    with distributed(60) as world:
        for name, steps in (("whole", 2), ("broken", 1), ("broken", 2)):
            run = ["--training.steps", str(steps), "--metrics.run_dir", str(folder / name)]
            train(load_recipe(GRPORecipe, [*flags, *run]), world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
