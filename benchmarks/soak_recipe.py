"""recipes/train_grpo.py with two doors that the soak opens from outside, by files in the folder SOAK_DOORS.

hang: rollouts that begin while it is there do not end before it goes. no-mount-RANK: that rank sees no checkpoints, as
where the folder is not mounted. All else is the production code, of which this script replaces two pieces in its own
process.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from grpo.checkpoint.storage import LocalFolder
from grpo.config import GRPORecipe
from grpo.data import ImageBatch
from grpo.jobs import train_grpo
from grpo.parallel import run_main
from grpo.rollout import Trajectory
from grpo.training import TrainingRun


def main(arguments: Sequence[str]) -> None:
    """Put the doors in place and run the recipe."""
    doors, rank = Path(os.environ["SOAK_DOORS"]), os.environ.get("RANK", "0")
    listing, build = LocalFolder.listing, train_grpo.build

    def listing_behind_a_door(folder: LocalFolder) -> list[str]:
        return [] if (doors / f"no-mount-{rank}").exists() else listing(folder)

    def build_behind_a_door(recipe: GRPORecipe, run: TrainingRun) -> train_grpo.Job:
        job = build(recipe, run)

        def rollout(batch: ImageBatch) -> Trajectory:
            while (doors / "hang").exists():
                time.sleep(0.1)
            return job.rollout(batch)

        return job._replace(rollout=rollout)

    LocalFolder.listing, train_grpo.build = listing_behind_a_door, build_behind_a_door
    train_grpo.main(arguments)


if __name__ == "__main__":
    run_main(main)
