"""Checkpoint folders on disk: names, what counts as complete, how one appears and goes."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Literal

from grpo.checkpoint.manifest import missing_files, read_manifest
from grpo.config import UserError
from grpo.parallel.safe_checkpoint import METADATA_NAME

RUN_STATE_NAME = "run_state.json"
STEP_NAME = "resume_step.txt"
STATE_TYPE_NAME = "state_type.txt"
CONSOLIDATED_NAME = "consolidated.pth"
SAFETENSORS_NAME = "consolidated.safetensors"

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


def incompleteness(path: Path) -> str | None:
    """Why a folder is not a whole checkpoint; None when every file that was written is there in full length.

    The contents of the files are not read: see `manifest.damaged_files`.
    """
    try:
        sums = read_manifest(path)
    except UserError as error:
        return str(error)
    missing = sorted({*missing_files(path, sums), *(name for name in _REQUIRED if name not in sums)})
    return f"{path} is incomplete: {', '.join(missing)} missing or cut short" if missing else None


def by_step(folder: Path) -> list[Path]:
    """Everything in the folder with a checkpoint's name, the highest step first."""
    paths = [path for path in folder.glob("step-*") if step_of(path) >= 0]
    return sorted(paths, key=step_of, reverse=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be written anew; an older one of the name goes."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    return aside


def start_partial(folder: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; what killed writers left behind is removed."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    path = partial_folder(folder, step)
    path.mkdir(parents=True)
    return path


def write_probe(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which is made if need be; None if something can."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_synced(probe, "x")
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


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


def remove_old(
    folder: Path, *, keep_last: int, keep_best: int, best_is: Literal["highest", "lowest"], newest: Path
) -> None:
    """Delete complete checkpoints that are neither among the `keep_last` newest nor among the `keep_best` best.

    Args:
        keep_last: 0 keeps all.
        newest: the one just written, which stays whatever its step is. Nothing is deleted unless it is whole.
    """
    if keep_last == 0 or incompleteness(newest) is not None:
        return
    others = [path for path in by_step(folder) if path != newest and incompleteness(path) is None]
    sign = 1 if best_is == "highest" else -1
    scores = {path: score_of(path) for path in (newest, *others)} if keep_best else {}
    ranked = sorted((path for path, score in scores.items() if score is not None), key=lambda p: -sign * scores[p])
    kept = {*others[: keep_last - 1], *ranked[:keep_best]}
    for path in others:
        if path not in kept:
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)  # at once, so that a half-deleted folder never looks like a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


def score_of(path: Path) -> float | None:
    """What a checkpoint is ranked by for keep-best; None if it has no such number."""
    try:
        score = json.loads((path / RUN_STATE_NAME).read_text()).get("score")
    except (OSError, ValueError, AttributeError):
        return None
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else None
