"""manifest.json: every file of a checkpoint with its size and checksum, so that damage is found before it is used."""

import errno
import fnmatch
import hashlib
import json
import stat
from collections.abc import Collection, Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from grpo.config import UserError, read_bytes, reason

MANIFEST_NAME = "manifest.json"
SHARDS = "shard-*.safetensors"  # what the ranks of a run have written, each its pieces of the tensors


class FileSum(NamedTuple):
    """What a file held when it was written."""

    size: int  # in bytes
    sha256: str


def open_file(path: Path) -> BufferedReader:
    """A file of a checkpoint. Raises an OSError where it is none: a link may lead elsewhere, a pipe never ends."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "it is a link or no file: copy the file itself there, if you trust it", str(path))
    return path.open("rb")


def read_file(path: Path) -> bytes:
    """A small file of a checkpoint. Raises an OSError as `open_file`, or a ValueError where it is not small."""
    open_file(path).close()
    return read_bytes(path)


def file_sums(files: Iterable[Path]) -> dict[str, FileSum]:
    """Size and SHA-256 of files as they are read back from the file system, by name. Raises an OSError."""
    sums = {}
    for path in files:
        with open_file(path) as file:
            sums[path.name] = FileSum(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return sums


def manifest_text(sums: Mapping[str, FileSum]) -> str:
    """The contents of manifest.json."""
    return json.dumps({name: sums[name]._asdict() for name in sorted(sums)}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """The files of a checkpoint. Raises a UserError for no manifest, a damaged one, or one that leaves the folder."""
    try:
        return parse_manifest(read_file(folder / MANIFEST_NAME), f"{folder}/{MANIFEST_NAME}")
    except (OSError, ValueError) as error:
        problem = f"{MANIFEST_NAME}: {reason(error)}; take another checkpoint"
        raise UserError(f"{folder} is not a whole checkpoint of a run: {problem}") from None


def parse_manifest(text: bytes, path: str) -> dict[str, FileSum]:
    """The same of a manifest's contents, wherever they come from; `path` is for the messages."""
    try:
        entries = json.loads(text)
        sums = {name: FileSum(entry["size"], entry["sha256"]) for name, entry in entries.items()}
        if any(type(known.size) is not int or type(known.sha256) is not str for known in sums.values()):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): take another checkpoint") from error
    for name in sums:
        if name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"{path} names {name!r}, which is not a file of this folder: do not trust it")
    return sums


def check_files(folder: Path, names: Collection[str]) -> None:
    """Raise a UserError if the folder has a manifest and one of these files is not what was written.

    Some shards without the others are refused: tensors that end sooner would look whole.
    """
    if (folder / MANIFEST_NAME).exists():
        sums = read_manifest(folder)
        read, written = set(fnmatch.filter(names, SHARDS)), set(fnmatch.filter(sums, SHARDS))
        if read and (gone := sorted(written - read)):
            raise UserError(f"{folder} is damaged: {', '.join(gone)} missing; take another checkpoint")
        if unknown := [name for name in names if name not in sums]:
            raise UserError(f"{folder} is damaged: {unknown[0]} is not in its {MANIFEST_NAME}; take another checkpoint")
        try:
            damaged = [name for name in names if file_sums([folder / name])[name] != sums[name]]
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {reason(error)}; take another checkpoint") from error
        if damaged:
            raise UserError(f"{folder} is damaged: {', '.join(damaged)} changed since it was written")
