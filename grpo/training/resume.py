"""Which checkpoint a run goes on from, and whether it may."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo.checkpoint import CheckpointManager
from grpo.config import TrainingRecipe, UserError, changes_that_matter, recipe_from_toml


def find_checkpoint(
    recipe: TrainingRecipe, checkpoints: CheckpointManager, tell: Callable[[str], None]
) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, None to start anew; and whether the user has named it. Collective.

    When torchrun starts the ranks again after a fault, the command line is the one of the first start. What
    `checkpoint.resume` = none or a path meant has been done then, and the run goes on from what it has written since.
    `tell` gets a line about each checkpoint that was passed over.

    Raises:
        UserError: `none`, and there are checkpoints; or the one that was named is damaged.
    """
    resume = recipe.checkpoint.resume
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if resume == "auto" or (resume == "none" and restarted):
        return checkpoints.resume_point(tell), False
    if resume == "none":
        if checkpoints.exist():
            raise UserError(
                f"checkpoint.resume = none: {recipe.checkpoint_dir} already holds checkpoints, which a new run would "
                "overwrite; give another metrics.run_dir or checkpoint.dir, or remove them"
            )
        return None, False

    def goes_on(path: Path) -> bool:
        """Whether a checkpoint was written by a run that had gone on from the one that was named."""
        try:
            return checkpoints.read_run_state(path).get("resumed_from") == resume
        except (UserError, AttributeError):
            return False

    if restarted and (own := checkpoints.resume_point(tell, accept=goes_on)) is not None:
        return own, False
    if (problem := checkpoints.damage(resume)) is not None:
        raise UserError(f"checkpoint.resume: {problem}")
    return Path(resume), True


def read_run_state(
    recipe: TrainingRecipe, checkpoints: CheckpointManager, path: Path, *, named: bool
) -> tuple[dict, list[str]]:
    """The state of the run in a checkpoint, and how the recipe has changed since in ways that matter.

    Who has `named` the checkpoint accepts the changes.

    Raises:
        UserError: the checkpoint is of another run, of a recipe that differs, or not one of a training run.
    """
    state = checkpoints.read_run_state(path)
    try:
        origin = f"{path}: the recipe in it"
        run_dir, before = str(state["run_dir"]), recipe_from_toml(type(recipe), state["recipe"], origin=origin)
        counts = state["step"], state["stream"]["samples"], state["optimizer_step"]["steps"]
        if any(int(count) < 0 for count in counts):
            raise ValueError("a count below 0")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: run_state.json is not that of a training run: take another checkpoint") from error
    inside = recipe.checkpoint_dir.parent == recipe.run_dir
    if not named and not inside and run_dir != str(recipe.run_dir):
        raise UserError(
            f"{recipe.checkpoint_dir} holds checkpoints of the run {run_dir}: give this run another checkpoint.dir, "
            f"or go on from it with checkpoint.resume = {path}"
        )
    changes = changes_that_matter(before, recipe)
    if changes and not named:
        problem = (
            f"{path} was written by a recipe that differs ({len(changes)} keys); change them back, give another "
            "metrics.run_dir, or name the checkpoint in checkpoint.resume to go on with the changes:"
        )
        raise UserError([problem, *changes])
    return state, changes


def require_classes(path: Path, before: Sequence[str] | None, now: Sequence[str] | None) -> None:
    """Raises a UserError if the classes that the run has learned by their ids are others in the data set of today."""
    pairs = zip(before if isinstance(before, list) else (), now or (), strict=False)
    for class_id, (old, new) in enumerate(pairs):
        if old != new:
            raise UserError(
                f"{path}: class {class_id} was {old!r} when it was written and is {new!r} in the data now: bring the "
                "classes back, or start another run from these weights (model.checkpoint), which knows its classes"
            )
