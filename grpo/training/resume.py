"""Which checkpoint a run goes on from, and whether it may."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.checkpoint import CheckpointManager, step_of
from grpo.config import TrainingRecipe, UserError, changes_that_matter, is_url, recipe_from_toml
from grpo.parallel import all_reduce_max, broadcast_object
from grpo.training.fingerprints import changed_since, same_contents

NO_STATE = "run_state.json is not that of a training run: take another checkpoint"
_LARGEST_COUNT = 2**48  # beyond, numbers of samples and steps overflow somewhere below


def find_checkpoint(
    recipe: TrainingRecipe, checkpoints: CheckpointManager, tell: Callable[[str], None]
) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, None to start anew; and whether the user has named it. Collective.

    The same command may be given many times: by hand, by torchrun after a fault, by a cluster that requeues. It then
    goes on from what it has written since, never back.

    | checkpoint.resume | no checkpoint of its own | own ones, which went on from the named one | other own ones |
    |---|---|---|---|
    | auto | starts anew | the newest | the newest |
    | none | starts anew | - | the newest after a restart by a launcher, else refused |
    | another run's checkpoint | from that | the newest | refused |
    | an own checkpoint | - | the newest | from that if it is the newest, else refused |

    `tell` gets a line about each damaged checkpoint that was passed over.

    Raises:
        UserError: refused as above; or the one that was named is damaged.
    """
    resume = recipe.checkpoint.resume
    if resume == "auto":
        return checkpoints.resume_point(tell), False
    if resume == "none":
        own, restarted = checkpoints.resume_point(tell), all_reduce_max(_restarts()) > 0
        if own is not None and not restarted:
            raise UserError(
                f"checkpoint.resume = none: {recipe.checkpoint_dir} already holds checkpoints, which a new run would "
                "overwrite; give another metrics.run_dir or checkpoint.dir, or remove them"
            )
        return own, False
    named = canonical(resume)
    is_own = named.rpartition("/")[0] == canonical(recipe.checkpoint_dir)
    newer = checkpoints.resume_point(tell, after=step_of(named) if is_own else -1)
    if newer is None:
        return checkpoints.named(named), True
    if broadcast_object(_origin(checkpoints, newer)) == named:
        return newer, False
    raise UserError(
        f"checkpoint.resume = {resume}: {recipe.checkpoint_dir} already holds {newer.name}, which did not go on from "
        "it and would be overwritten; give another metrics.run_dir, or checkpoint.resume = auto to go on from there"
    )


def canonical(place: str) -> str:
    """One text for one place, however it is written: an absolute path without links, or a URL."""
    return place.rstrip("/") if is_url(place) else os.path.realpath(place)


def _restarts() -> int:
    """How often a launcher has started this process's run again; hosts may count differently."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return max(int(count[:9]) if count.isdecimal() else 0 for count in counts)


def _origin(checkpoints: CheckpointManager, path: Path) -> str | None:
    """The checkpoint that a run's user had named when it wrote this one."""
    state = checkpoints.read_run_state(path)
    return state.get("resumed_from") if isinstance(state, dict) else None


def read_run_state(
    recipe: TrainingRecipe,
    checkpoints: CheckpointManager,
    path: Path,
    *,
    named: bool,
    fingerprints: Mapping[str, Mapping[str, Any]],
    own: Mapping[str, Any],
) -> tuple[dict, list[str]]:
    """The state of the run in a checkpoint, and how the recipe has changed since in ways that matter.

    So have the data set, or files that it reads, where their `fingerprints` are others. Who has `named` the checkpoint
    accepts the changes. `own` is what this run would write now of what it takes over: numbers are to be where it has
    numbers.

    Raises:
        UserError: the checkpoint is of another run, of a recipe that differs, or not one of a training run.
    """
    state, place = checkpoints.read_run_state(path), checkpoints.place_of(path)
    try:
        origin = f"{place}: the recipe in it"
        run_dir, before = str(state["run_dir"]), recipe_from_toml(type(recipe), state["recipe"], origin=origin)
        if not all(_has_form(state[name], form) for name, form in own.items()):
            raise ValueError("something else where a number is expected")
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{place}: {NO_STATE}") from error
    inside = Path(recipe.checkpoint_dir).parent == recipe.run_dir
    if not named and not inside and run_dir != str(recipe.run_dir):
        raise UserError(
            f"{recipe.checkpoint_dir} holds checkpoints of the run {run_dir}: give this run another checkpoint.dir, "
            f"or go on from it with checkpoint.resume = {place}"
        )
    moved = {key if key != "data" else "data.path" for key in same_contents(state.get("fingerprints"), fingerprints)}
    changes = [line for line in changes_that_matter(before, recipe) if line.partition(":")[0] not in moved]
    changes += changed_since(state.get("fingerprints"), fingerprints)
    if before.training.steps != recipe.training.steps and recipe.optimizer.schedule != "constant":
        steps = f"training.steps: {before.training.steps} -> {recipe.training.steps}"
        changes.append(f"{steps}, and with it the learning rate of optimizer.schedule = {recipe.optimizer.schedule}")
    if changes and not named:
        problem = (
            f"{place} was written by a run whose recipe, data or files differ ({len(changes)} keys); change them back, "
            "give another metrics.run_dir, or name the checkpoint in checkpoint.resume to go on with the changes:"
        )
        raise UserError([problem, *changes])
    return state, changes


def _has_form(found: Any, own: Any) -> bool:
    """Whether a value of a file has a number, or numbers by name, where `own` has them; what one lacks is not seen."""
    match own:
        case bool() | None:
            return True
        case int():
            return type(found) is int and 0 <= found <= _LARGEST_COUNT
        case float():
            return type(found) in (int, float) and abs(found) <= _LARGEST_COUNT and math.isfinite(found)
        case dict():
            return isinstance(found, dict) and all(_has_form(found[name], own[name]) for name in own if name in found)
        case list():
            return isinstance(found, list)
        case _:
            return True


def require_classes(place: str, before: Sequence[str] | None, now: Sequence[str] | None) -> None:
    """Raises a UserError if the classes that the run has learned by their ids are others in the data set of today."""
    pairs = zip(before if isinstance(before, list) else (), now or (), strict=False)
    for class_id, (old, new) in enumerate(pairs):
        if old != new:
            raise UserError(
                f"{place}: class {class_id} was {old!r} when it was written and is {new!r} in the data now: bring the "
                "classes back, or start another run from these weights (model.checkpoint), which knows its classes"
            )
