"""Checkpoint folders on disk: names, what counts as complete, how one appears and goes."""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo.config import Checkpoint, UserError
from grpo.formats import RUN_STATE_NAME, FileSum, file_sums, read_manifest

STEP_NAME = "resume_step.txt"
STATE_TYPE_NAME = "state_type.txt"

_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_REQUIRED = {RUN_STATE_NAME, STEP_NAME, STATE_TYPE_NAME}


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


def by_step(folder: Path) -> list[Path]:
    """Everything in the folder with a checkpoint's name, the highest step first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of, reverse=True)


def inventory(path: Path) -> tuple[str | None, dict[str, FileSum]]:
    """Why a folder is not a whole checkpoint, None if each of its files is there in full length; and those files."""
    try:
        sums = read_manifest(path)
        found = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    except UserError as error:
        return str(error), {}
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}", {}
    missing = {name for name, known in sums.items() if found.get(name) != known.size} | (_REQUIRED - sums.keys())
    return f"{path} is incomplete: {', '.join(sorted(missing))} missing or cut short" if missing else None, sums


def incompleteness(path: Path) -> str | None:
    """Why a folder is not a whole checkpoint; its files are not read."""
    return inventory(path)[0]


def faults(path: Path, sums: Mapping[str, FileSum], *, part: int = 0, parts: int = 1) -> dict[str, str]:
    """What this process finds wrong with every `parts`-th of the files, by size, from `part` on: name -> reason."""
    found = {}
    for name in sorted(sums, key=lambda name: (-sums[name].size, name))[part::parts]:
        try:
            if file_sums([path / name])[name] != sums[name]:
                found[name] = "changed since it was written"
        except OSError as error:
            found[name] = f"cannot be read ({error.strerror})"
    return found


def read_run_file(path: str | Path) -> dict[str, Any]:
    """run_state.json. Raises a UserError if it is not there, or damaged."""
    file = Path(path) / RUN_STATE_NAME
    try:
        state = json.loads(file.read_text())
        if not {"run", "world_size"} <= state.keys():
            raise ValueError("keys are missing")
    except OSError as error:
        raise UserError(f"{path} is not a checkpoint of a run: {RUN_STATE_NAME}: {error.strerror}.") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): take another checkpoint.") from None
    return state


def set_aside(path: Path) -> str:
    """Rename a damaged checkpoint, so that its step can be written anew; an older one of the name goes. Says so."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        _remove(aside)
        path.rename(aside)
    except OSError as error:
        return f"it could not be renamed ({error.strerror}), looking for the one before"
    return f"renamed to {aside.name}, looking for the one before"


def start_partial(folder: Path, step: int) -> None:
    """Make an empty folder to write a checkpoint into, where there is none of this step; leftovers are removed."""
    if (final := step_folder(folder, step)).exists():
        remedy = "resume from it, remove it, or choose another checkpoint.dir"
        raise UserError(f"{final} exists and is not overwritten: {remedy}")
    for leftover in folder.glob(".step-*"):
        _remove(leftover)
    partial_folder(folder, step).mkdir(parents=True)


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


def remove_old(folder: Path, config: Checkpoint, *, newest: Path) -> None:
    """Delete complete checkpoints that are neither among the `keep_last` newest (0: all) nor the `keep_best` best.

    `newest`, the one just written, stays whatever its step is; nothing is deleted unless it is whole.
    """
    if config.keep_last == 0 or incompleteness(newest) is not None:
        return
    others = [path for path in by_step(folder) if path != newest and incompleteness(path) is None]
    scores = {path: score for path in (newest, *others) if config.keep_best and (score := score_of(path)) is not None}
    ranked = sorted(scores, key=scores.__getitem__, reverse=config.best_is == "highest")
    for path in others:
        if path not in {*others[: config.keep_last - 1], *ranked[: config.keep_best]}:
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)  # at once, so that a half-deleted folder never looks like a checkpoint
            with suppress(OSError):
                _remove(doomed)


def _remove(path: Path) -> None:
    """Delete a folder, or the link to one and not what it leads to; nothing where nothing is."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def score_of(path: Path) -> float | None:
    """What a checkpoint is ranked by for keep_best; None if it has no such number."""
    try:
        score = read_run_file(path).get("score")
    except UserError:
        return None
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else None
