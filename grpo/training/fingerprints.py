"""What a run depends on besides its recipe, told apart by contents: the data set and the files read at every start."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.config import TrainingRecipe, UserError
from grpo.data import ImageDataset
from grpo.parallel import World, broadcast_object

_NOTICEABLE_SECONDS = 5.0


def take_fingerprints(
    recipe: TrainingRecipe, dataset: ImageDataset, world: World
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Key -> part -> what it is now, and notes for the user. Collective; rank 0 alone reads the files.

    Raises a UserError, on every rank: a file cannot be read.
    """
    found, notes, problem = {}, [], None
    if world.is_main:
        begun, size = time.perf_counter(), 0
        try:
            found["data"] = dict(dataset.fingerprint)
            if dataset.requests is not None:
                found["text"] = dataset.requests.identity
            for key, path in recipe.files_of_every_start().items():
                found[key], read = _contents(Path(path))
                size += read
        except OSError as error:
            problem = UserError(f"{error.filename} cannot be read: {error.strerror}")
        if (seconds := time.perf_counter() - begun) > _NOTICEABLE_SECONDS:
            notes = [f"fingerprints of the data set and of {size / 2**30:.1f} GiB of weights took {seconds:.0f} s"]
    found, notes, problem = broadcast_object((found, notes, problem))
    if problem is not None:
        raise problem
    return found, notes


def changed_since(before: Any, now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each key whose contents are others than in a checkpoint, as it has noted them."""
    before = before if isinstance(before, dict) else {}
    lines = []
    for key in (key for key in now if isinstance(before.get(key), dict) and before[key] != now[key]):
        parts = [name for name in {**before[key], **now[key]} if before[key].get(name) != now[key].get(name)]
        what = ", ".join(parts) if key in ("data", "text") else "other contents"
        lines.append(f"{key}: {what} since the checkpoint was written")
    return lines


def same_contents(before: Any, now: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Keys of files whose contents are the same, wherever they lie."""
    return {key for key in now if isinstance(before, dict) and before.get(key) == now[key]}


def _contents(path: Path) -> tuple[dict[str, str], int]:
    """SHA-256 of a file, or over the names and contents of a folder's, and the bytes that were read."""
    if not path.is_dir():
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}, path.stat().st_size
    total, size = hashlib.sha256(), 0
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        part, read = _contents(file)
        total.update(f"{file.relative_to(path)}\0{part['sha256']}\0".encode("utf-8", "surrogateescape"))
        size += read
    return {"sha256": total.hexdigest()}, size
