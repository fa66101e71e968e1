"""Codes of a whole data set on disk: what `grpo encode` writes, and LlamaGen's folders of codes.

A folder of ours holds `codes.json` (sizes, fingerprints, class names), `labels.npy` [N] int64 and shards
`codes-00000.npy` [n, A, T] of A variants of each image, which are memory-mapped. A shard appears under its name when it
is whole, with a `codes-00000.json` of the images that could not be read; `codes.json` says when all shards are there.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from grpo.config import TransientError, UserError, read_text, reason
from grpo.data.code_reader import CodeReader, read_array
from grpo.data.dataset import UnreadableImage

ABOUT = "codes.json"
LABELS = "labels.npy"
FORMAT = 1
UNFINISHED = ".unfinished"  # ends the name of a file that is being written
PLAIN_FIRST = ("none", "flip")  # augmentations whose first variant is the image as it is
_TYPES = {"count": int, "variants": int, "length": int, "codebook_size": int, "shard_size": int, "complete": bool}


class CodeFolder(CodeReader):
    """A folder that `grpo encode` has written; `about` is what its `codes.json` says.

    Raises:
        UserError: no such folder, not one of codes, damaged, or not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.about = read_about(self.path)
        if not self.about["complete"]:
            raise UserError(f"{path} is not finished: start the same `grpo encode` again, it goes on where it stopped")
        self.length, self.variants = self.about["length"], self.about["variants"]
        self.plain_first = self.about["augmentation"] in PLAIN_FIRST
        self.labels = _read_array(self.path / LABELS, (self.about["count"],))
        self.class_names = self.about["class_names"]
        self._unreadable = {int(index): str(reason) for index, reason in self.about["unreadable"].items()}
        self._shards = [self._shard(number) for number in range(shard_count(self.about))]

    def _shard(self, number: int) -> np.ndarray:
        start = number * self.about["shard_size"]
        rows = min(self.about["shard_size"], self.about["count"] - start)
        return _read_array(self.path / shard_name(number), (rows, self.variants, self.length))

    def __str__(self) -> str:
        return str(self.path)

    def row(self, index: int, variant: int) -> np.ndarray:
        if index in self._unreadable:
            raise UnreadableImage(self._unreadable[index])
        shard, row = divmod(index, self.about["shard_size"])
        return self._shards[shard][row, variant]

    def identify(self) -> Sequence[bytes]:
        """For the fingerprint of a data set that has nothing but these codes."""
        return (json.dumps(self.about["fingerprint"], sort_keys=True).encode(),)


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"codes-{number:05d}.npy"


def shard_count(about: Mapping[str, Any]) -> int:
    """Shards of a folder."""
    return -(-about["count"] // about["shard_size"])


def read_about(folder: Path) -> dict[str, Any]:
    """What `codes.json` says, checked. Raises a UserError: no such file, or damaged."""
    file = folder / ABOUT
    if not file.exists():
        state = "does not exist" if not folder.exists() else f"has no {ABOUT}: it was not written by `grpo encode`"
        raise UserError(f"{folder} {state}; give a folder of codes")
    about = read_json(file)
    sound = about.get("format") == FORMAT
    sound = sound and all(type(about.get(key)) is kind and about[key] >= 0 for key, kind in _TYPES.items())
    sound = sound and isinstance(about.get("fingerprint"), dict) and isinstance(about.get("unreadable"), dict)
    sound = sound and isinstance(about.get("class_names"), list) and isinstance(about.get("augmentation"), str)
    sound = sound and all(type(name) is str and _is_text(name) for name in about["class_names"])
    sound = sound and all(index.isdecimal() and len(index) < 16 for index in about["unreadable"])
    sound = sound and min(about[key] for key in ("shard_size", "variants", "length")) > 0
    if not sound:
        raise UserError(f"{file} is damaged, or of another version: encode the data set again")
    return about


def _is_text(name: str) -> bool:
    """Whether it can be written: JSON can hold half of a surrogate pair."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def read_json(file: Path) -> dict[str, Any]:
    """An object in a file. Raises a UserError."""
    try:
        value = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}; encode the data set again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: encode the data set again")
    return value


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The parts of a fingerprint that are not the same, in words."""
    words = {"files": "the image files", "labels": "the labels", "tokenizer": "the tokenizer's weights"}
    different = [key for key in wanted if found.get(key) != wanted[key]]
    return [words.get(key, f"{key} ({found.get(key)}, now {wanted[key]})") for key in different]


def write_file(path: Path, write: Any) -> None:
    """Make a file by `write(file)`, whole or not at all, on disk before it appears. Raises a UserError."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise TransientError(
            f"{path} could not be written: {error.strerror}; free space there and start again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """The same, of JSON."""
    write_file(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def _read_array(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An .npy of whole numbers, memory-mapped."""
    try:
        array = read_array(file, mapped=True)
    except UserError as error:
        raise UserError(f"{error}; remove it and start `grpo encode` again") from error
    if array.shape != shape:
        raise UserError(f"{file} is {array.dtype} {list(array.shape)}, expected whole numbers {list(shape)}")
    return array
