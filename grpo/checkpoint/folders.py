"""Checkpoint folders on disk: names, what counts as complete, how one appears and goes."""

import os
import re
import shutil
from pathlib import Path

from grpo.config import UserError
from grpo.parallel.safe_checkpoint import METADATA_NAME, missing_pieces, read_metadata

RUN_STATE_NAME = "run_state.json"
STEP_NAME = "resume_step.txt"
STATE_TYPE_NAME = "state_type.txt"
CONSOLIDATED_NAME = "consolidated.pth"

_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_REQUIRED = (METADATA_NAME, RUN_STATE_NAME, STEP_NAME, STATE_TYPE_NAME)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step appears."""
    return folder / f"step-{step:06d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Where it is written before that; a name that is never taken for a checkpoint."""
    return folder / f".step-{step:06d}.partial"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name; -1 for any other name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def is_complete(path: Path) -> bool:
    """Whether a folder holds a whole checkpoint: every file that its metadata names, in full length."""
    if not all((path / name).is_file() for name in _REQUIRED):
        return False
    try:
        return not missing_pieces(path, read_metadata(path))
    except UserError:
        return False


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, if any."""
    return next((path for path in _by_step(folder) if is_complete(path)), None)


def start_partial(folder: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; what killed writers left behind is removed."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    path = partial_folder(folder, step)
    path.mkdir(parents=True)
    return path


def publish(partial: Path, final: Path) -> None:
    """Make a finished checkpoint visible at once, durably. An existing non-empty folder is left alone: OSError."""
    sync(partial)
    os.rename(partial, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str) -> None:
    """Write a small text file and wait until it is on the disk."""
    path.write_text(text)
    sync(path)


def remove_old(folder: Path, *, keep: int, newest: Path) -> None:
    """Delete complete checkpoints beyond the `keep` newest; 0 keeps all.

    Args:
        newest: the one just written, which stays whatever its step is.
    """
    if keep == 0:
        return
    others = [path for path in _by_step(folder) if path != newest and is_complete(path)]
    for path in others[keep - 1 :]:
        doomed = path.with_name(f".{path.name}.removed")
        path.rename(doomed)  # at once, so that a half-deleted folder never looks like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("step-*") if step_of(path) >= 0]
    return sorted(paths, key=step_of, reverse=True)
