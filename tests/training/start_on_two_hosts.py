"""Run by torchrun on two ranks: FOLDER/run has the checkpoints of a run that was told checkpoint.resume = none."""

import os
import sys
from pathlib import Path

import pytest

from grpo.checkpoint import CheckpointManager
from grpo.config import GRPORecipe, UserError, load_recipe
from grpo.parallel import distributed
from grpo.training.resume import find_checkpoint


def main(folder: Path) -> None:
    flags = ["--config", "debug", "--checkpoint.dir", str(folder / "run"), "--checkpoint.resume", "none"]
    recipe = load_recipe(GRPORecipe, flags)
    with distributed(60) as world:
        manager = CheckpointManager(recipe.checkpoint_dir, world=world, config=recipe.checkpoint, timeout_seconds=60)
        for count in ("0", "3", "abc"):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = count if world.rank == 1 else "0"
            if count == "3":
                assert find_checkpoint(recipe, manager, print) == (folder / "run/step-000003", False)
            else:
                with pytest.raises(UserError, match="already holds checkpoints"):
                    find_checkpoint(recipe, manager, print)
        manager.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
