"""The names in a checkpoint's folder, and the files in it as this process sees them on its own disk."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.config import UserError, reason
from grpo.formats import RUN_STATE_NAME, FileSum, check_format, file_sums, read_file

STEP_NAME = "resume_step.txt"
STATE_TYPE_NAME = "state_type.txt"
REQUIRED = {RUN_STATE_NAME, STEP_NAME, STATE_TYPE_NAME}

_STEP_FOLDER = re.compile(r"step-(\d{6,})")


def step_name(step: int) -> str:
    """The name under which the checkpoint of a step appears."""
    return f"step-{step:06d}"


def partial_name(step: int) -> str:
    """Its name while it is written; one that is never taken for a checkpoint."""
    return f".step-{step:06d}.partial"


def step_of(path: str | Path) -> int:
    """The step in a checkpoint folder's name; -1 for any other name."""
    match = _STEP_FOLDER.fullmatch(Path(path).name)
    return int(match[1]) if match else -1


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
    """run_state.json. Raises a UserError if it is not there, damaged, or of another format."""
    file = Path(path) / RUN_STATE_NAME
    try:
        return parse_run_file(read_file(file), file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of a run: {RUN_STATE_NAME}: {reason(error)}.") from None


def parse_run_file(text: bytes, file: str | Path) -> dict[str, Any]:
    """The same of the file's contents, wherever they come from; `file` is for the messages."""
    try:
        state = json.loads(text)
        if not {"run", "world_size"} <= state.keys():
            raise ValueError("keys are missing")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): take another checkpoint.") from None
    check_format(state, file)
    return state


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
