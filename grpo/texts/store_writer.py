"""Writing features of texts by many ranks, so that a killed job goes on where it stopped."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo.config import UserError, writing
from grpo.texts.store import ABOUT, FORMAT, SHARD_NAME, Shard, open_shard, read_about, text_key


class FeatureWriter:
    """A folder of features in the making; `FeatureStore` reads it.

    Args:
        encoder: what makes the features, in a few words and hashes.
        width: C.
        max_tokens: of a text, at most.
        precision: of the encoder and of the features, "bf16" or "fp32".
    """

    def __init__(
        self, folder: str | Path, *, encoder: Mapping[str, Any], width: int, max_tokens: int, precision: str
    ) -> None:
        self.folder = Path(folder)
        sizes = {"width": width, "max_tokens": max_tokens, "precision": precision}
        self.about: dict[str, Any] = {"format": FORMAT, "encoder": dict(encoder), **sizes}

    def start(self) -> set[bytes]:
        """Keys of the texts whose features are there already, those of whole shards of a killed job included.

        To be called by one rank, before any other writes.

        Raises:
            UserError: the folder holds something else, or cannot be written.
        """
        with writing(f"encode_text.output {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            is_empty = not any(self.folder.iterdir())
        if (self.folder / ABOUT).exists():
            found = read_about(self.folder)
            if different := [key for key in self.about if found.get(key) != self.about[key]]:
                raise UserError(
                    f"encode_text.output {self.folder} holds features of something else: {', '.join(different)} "
                    "differ; give another folder, or remove this one"
                )
        elif is_empty:
            self._write_about({}, complete=False)
        else:
            raise UserError(f"encode_text.output {self.folder} is not empty and holds no features: give another folder")
        for file in self.folder.glob(".*.unfinished"):
            file.unlink(missing_ok=True)
        return {key.tobytes() for shard in self._whole().values() for key in shard.keys}

    def key(self, text: str) -> bytes:
        """By what the features of a text are found."""
        return text_key(text, self.about["encoder"])

    def write(self, texts: Sequence[str], features: Sequence[Tensor]) -> None:
        """Write a shard of texts and their features [L, C], bf16 or fp32. Raises a UserError."""
        keys = np.frombuffer(b"".join(self.key(text) for text in texts), dtype=np.uint8).reshape(len(texts), -1)
        starts = torch.tensor([0, *(len(rows) for rows in features)]).cumsum(0)
        name = f"features-{text_key(keys.tobytes().hex(), self.about['encoder']).hex()}.safetensors"
        unfinished = self.folder / f".{name}.unfinished"
        tensors = {"keys": torch.from_numpy(keys.copy()), "starts": starts, "features": torch.cat(list(features))}
        with writing(self.folder / name):
            save_file(tensors, unfinished)
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, self.folder / name)

    def finish(self) -> int:
        """Name all shards in `features.json`, on one rank after all have written theirs; the number of texts."""
        shards = self._whole()
        entries = {
            name: {"size": (self.folder / name).stat().st_size, "sha256": shard.index_sha256}
            for name, shard in shards.items()
        }
        self._write_about(entries, complete=True)
        return sum(len(shard.keys) for shard in shards.values())

    def _whole(self) -> dict[str, Shard]:
        """The shards that are there, by name."""
        names = sorted(path.name for path in self.folder.iterdir() if SHARD_NAME.fullmatch(path.name))
        return {name: open_shard(self.folder / name, self.about) for name in names}

    def _write_about(self, shards: Mapping[str, Any], *, complete: bool) -> None:
        file = self.folder / ABOUT
        unfinished = file.with_name(f".{ABOUT}.unfinished")
        with writing(file):
            unfinished.write_text(json.dumps({**self.about, "complete": complete, "shards": shards}, indent=1))
            os.replace(unfinished, file)
