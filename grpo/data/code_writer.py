"""Writing codes of a data set by many ranks, so that a killed job goes on where it stopped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grpo.config import UserError
from grpo.data.code_files import (
    ABOUT,
    LABELS,
    UNFINISHED,
    CodeFolder,
    differences,
    read_about,
    read_json,
    shard_count,
    shard_name,
    write_file,
    write_json,
)
from grpo.data.index_cache import on_main_rank


class CodeWriter:
    """A folder of codes in the making; `CodeFolder` reads it.

    Args:
        about: `codes.json` of the folder: what is encoded and how.
        labels: [N] int64.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], labels: np.ndarray) -> None:
        self.folder, self.about, self.labels = Path(folder), dict(about), labels
        size = about["shard_size"]
        self.shards = [range(start, min(start + size, about["count"])) for start in range(0, about["count"], size)]

    def start(self) -> list[int]:
        """Numbers of the shards that are still to be written, the same on all ranks. Collective.

        Raises:
            UserError: the folder holds something else, or cannot be written.
        """
        return on_main_rank(self._start)

    def _start(self) -> list[int]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_empty = all(file.name.endswith(UNFINISHED) for file in self.folder.iterdir())
        except OSError as error:
            raise UserError(f"encode.output {self.folder} cannot be written: {error.strerror}") from error
        if (self.folder / ABOUT).exists():
            self._compare(read_about(self.folder))
        elif is_empty:
            write_json(self.folder / ABOUT, {**self.about, "unreadable": {}, "complete": False})
        else:
            raise UserError(f"encode.output {self.folder} is not empty and holds no codes: give another folder")
        if not (self.folder / LABELS).exists():
            write_file(self.folder / LABELS, lambda file: np.save(file, self.labels))
        return [number for number in range(len(self.shards)) if not (self.folder / shard_name(number)).exists()]

    def _compare(self, found: Mapping[str, Any]) -> None:
        """That codes already there are of the same data, by the same tokenizer and settings."""
        different = differences(found["fingerprint"], self.about["fingerprint"])
        settings = {key: value for key, value in self.about.items() if key != "fingerprint"}
        different += differences(found, settings) if not different else []
        if different:
            raise UserError(
                f"encode.output {self.folder} holds codes of something else: {', '.join(different)} differ; give "
                "another folder, or remove this one"
            )

    def write(self, number: int, codes: np.ndarray, unreadable: Mapping[int, str]) -> None:
        """Write a shard [n, A, T]; what could not be read is written before it. Raises a UserError."""
        file = self.folder / shard_name(number)
        write_json(file.with_suffix(".json"), unreadable)
        dtype = np.uint16 if self.about["codebook_size"] <= 2**16 else np.uint32
        write_file(file, lambda opened: np.save(opened, codes.astype(dtype)))

    def finish(self) -> CodeFolder:
        """Say that all shards are there, on rank 0 after all ranks have written theirs."""
        unreadable: dict[str, str] = {}
        for number in range(shard_count(self.about)):
            unreadable |= read_json((self.folder / shard_name(number)).with_suffix(".json"))
        write_json(self.folder / ABOUT, {**self.about, "unreadable": unreadable, "complete": True})
        return CodeFolder(self.folder)
