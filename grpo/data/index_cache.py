"""What rank 0 finds out about a data set: looked up once for all ranks, and kept in a file for the next start.

An index file is an .npz of plain arrays, never pickled. What is in it is compared with the disk before it is used, and
one that is damaged is made anew.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch.distributed as dist

from grpo.config import UserError, require_regular
from grpo.parallel import broadcast_object

logger = logging.getLogger(__name__)

FOLDER = ".grpo-cache"  # inside the data set's folder; a name with a dot is no class
SETTLED_NS = 2_000_000_000  # what changed less long ago may change again without a new time stamp

Found = TypeVar("Found")


def on_main_rank(find: Callable[[], Found]) -> Found:
    """What `find` gives on rank 0, on every rank, or the UserError that it raises. Collective in a process group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return find()
    found, problems = None, None
    if dist.get_rank() == 0:
        try:
            found = find()
        except UserError as error:
            problems = error.problems
    found, problems = broadcast_object((found, problems))
    if problems is not None:
        raise UserError(problems)
    return found


def cache_folder(where: str, beside: str | Path) -> Path | None:
    """The folder for what is kept about the data set at `beside`, made if need be; None keeps nothing.

    Args:
        where: data.index_cache: "auto" is beside the data where that can be written, else the user's cache folder;
            "none"; or a folder.
    """
    if where == "none":
        return None
    beside = Path(beside)
    beside = beside if beside.is_dir() else beside.parent
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo"
    for folder in [beside / FOLDER, user] if where == "auto" else [Path(where)]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            continue
        if os.access(folder, os.W_OK):
            return folder
        reason = "it cannot be written"
    logger.warning("nothing is kept about %s for the next start: %s", beside, reason)
    return None


def index_file(folder: Path | None, kind: str, of: str | Path) -> Path | None:
    """The index of that kind of what is at `of`."""
    if folder is None:
        return None
    digest = hashlib.sha256(os.fsencode(os.path.realpath(of))).hexdigest()[:16]
    return folder / f"{kind}-{digest}.npz"


def read_index(path: Path | None, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The arrays so named of an index file; None where there is no such file, or not such a one."""
    if path is None:
        return None
    try:
        require_regular(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names}
    except Exception:  # it lies beside the data and may be anyone's: zip archives and arrays raise all kinds
        return None
    return arrays if all(isinstance(array, np.ndarray) for array in arrays.values()) else None


def write_index(path: Path | None, arrays: dict[str, np.ndarray]) -> None:
    """Write an index file, whole or not at all; a disk that does not take it costs time at the next start only."""
    if path is None:
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, **cast(dict[str, Any], arrays))
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        logger.warning("%s could not be written, the next start looks again: %s", path, error.strerror)


def pack(texts: Sequence[str]) -> np.ndarray:
    """File names, or other texts without NUL, as one array [bytes] uint8."""
    return np.array(bytearray(os.fsencode("\0".join(texts))), dtype=np.uint8)


def unpack(packed: np.ndarray, count: int) -> list[str]:
    """The texts of `pack`. Raises a ValueError where they are not `count`."""
    texts = os.fsdecode(packed.astype(np.uint8).tobytes()).split("\0") if count else []
    if len(texts) != count:
        raise ValueError(f"{len(texts)} texts, not {count}")
    return texts
