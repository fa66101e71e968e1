"""Features of texts on disk: what `grpo encode-text` writes and runs read.

A folder holds `features.json` and shards `features-HASH.safetensors`. A shard has, of n texts, `keys` [n, 16] uint8,
hashes of text and encoder; `starts` [n + 1] int64; and `features` [starts[n], C], of which rows starts[i] to
starts[i + 1] are those of text i. It appears under its name when it is whole, and is never changed. `features.json`,
written last, names the shards, with their sizes and the SHA-256 of keys and starts. Features are memory-mapped; what is
read is compared with what was written as far as that does not read all of them.
"""

import hashlib
import json
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from grpo.config import UserError, read_text, reading
from grpo.texts.features import TextEncoder

ABOUT = "features.json"
FORMAT = 1
SHARD_NAME = re.compile(r"features-[0-9a-f]{32}\.safetensors")
KEY_BYTES = 16
_AGAIN = "remove it and start `grpo encode-text` again"


class Shard(NamedTuple):
    """An opened file of features."""

    keys: np.ndarray  # [n, 16] uint8
    starts: np.ndarray  # [n + 1] int64
    features: Any  # the library's slice of [rows, C], mapped
    index_sha256: str  # of keys and starts


class FeatureStore(TextEncoder):
    """A folder of features. Its order of texts is that of their hashes.

    Raises:
        UserError: no such folder, damaged, not finished, or features of another width than C.
    """

    remedy = "add them with `grpo encode-text`, with the same data and the T5 that made the others"

    def __init__(self, folder: str | Path, *, rows: int, width: int) -> None:
        super().__init__(rows=rows, width=width)
        self.lacks = f"text.features {folder} has no features of"
        self.folder, self.about = Path(folder), read_about(Path(folder))
        if self.about["width"] != width:
            raise UserError(
                f"text.features {folder} has features of width {self.about['width']}, model.caption_dim is {width}: "
                "set it to the former or encode the texts by another T5"
            )
        if not self.about["complete"]:
            raise UserError(f"text.features {folder} is not finished: start the same `grpo encode-text` again")
        self._shards = [self._listed(name, entry) for name, entry in self.about["shards"].items()]
        empty = np.empty((0, KEY_BYTES), dtype=np.uint8)
        keys = np.concatenate([empty, *(shard.keys for shard in self._shards)])
        heads = _heads(keys)
        self._order = np.argsort(heads, kind="stable")
        self._keys, self._heads = keys[self._order], heads[self._order]
        self._first = np.cumsum([0, *(len(shard.keys) for shard in self._shards)])

    def _listed(self, name: str, entry: Mapping[str, Any]) -> Shard:
        """A shard that `features.json` names, if it is still what was written."""
        path = self.folder / name
        shard = open_shard(path, self.about)
        if path.stat().st_size != entry.get("size") or shard.index_sha256 != entry.get("sha256"):
            raise UserError(f"{path} is not what was written: {_AGAIN}")
        return shard

    @property
    def identity(self) -> dict[str, str | int]:
        return dict(self.about["encoder"])

    def __len__(self) -> int:
        return len(self._keys)

    def _place(self, text: str) -> int | None:
        """Number of a text among all of the shards."""
        key = np.frombuffer(text_key(text, self.about["encoder"]), dtype=np.uint8)
        at = int(np.searchsorted(self._heads, _heads(key[None])[0]))
        while at < len(self._keys) and (self._keys[at, :8] == key[:8]).all():
            if (self._keys[at] == key).all():
                return int(self._order[at])
            at += 1
        return None

    def missing(self, texts: Iterable[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if self._place(text) is None]

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        self.require(texts)
        places = (self._place(text) for text in texts)
        return [self._rows_of(place) for place in places if place is not None]  # all are there

    def _rows_of(self, place: int) -> Tensor:
        """[L, C], L at most P."""
        number = int(np.searchsorted(self._first, place, side="right")) - 1
        shard, row = self._shards[number], place - self._first[number]
        start = int(shard.starts[row])
        stop = min(int(shard.starts[row + 1]), start + self.rows)
        return shard.features[start:stop].float()


def text_key(text: str, encoder: Mapping[str, Any]) -> bytes:
    """By what a text's features are found, 16 bytes: a hash of the text and of what encoded it."""
    told = json.dumps(encoder, sort_keys=True).encode()
    return hashlib.sha256(len(told).to_bytes(8, "big") + told + text.encode("utf-8", "replace")).digest()[:KEY_BYTES]


def read_about(folder: Path) -> dict[str, Any]:
    """What `features.json` says, checked. Raises a UserError: no such file, or damaged."""
    file = folder / ABOUT
    if not file.exists():
        state = f"has no {ABOUT}: it was not written by `grpo encode-text`" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {state}; give a folder of features")
    with reading(f"{file} cannot be read", remedy="encode the texts again"):
        about = json.loads(read_text(file))
        sizes = [about["width"], about["max_tokens"]]
        sound = about["format"] == FORMAT and all(type(size) is int and 0 < size < 2**20 for size in sizes)
        sound = sound and isinstance(about["encoder"], dict) and type(about["complete"]) is bool
        sound = sound and all(SHARD_NAME.fullmatch(name) and isinstance(entry, dict) for name, entry in
                              about["shards"].items())  # fmt: skip
        if not sound:
            raise ValueError("it is damaged, or of another version")
    return about


def open_shard(path: Path, about: Mapping[str, Any]) -> Shard:
    """Map a shard. Raises a UserError: it is no file, damaged, or not of that width."""
    with reading(f"{path} cannot be read", remedy=_AGAIN):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("it is a link or no file")
        file = safe_open(path, framework="pt")
        keys, starts, features = file.get_tensor("keys"), file.get_tensor("starts"), file.get_slice("features")
        rows, width = features.get_shape()
        lengths = starts.diff() if starts.dtype == torch.int64 else torch.zeros(1)
        sound = keys.dtype == torch.uint8 and keys.shape == (len(starts) - 1, KEY_BYTES) and width == about["width"]
        sound = sound and int(starts[0]) == 0 and int(starts[-1]) == rows and features.get_dtype() in ("BF16", "F32")
        if not sound or not (bool((lengths > 0).all()) and int(lengths.max()) <= about["max_tokens"]):
            raise ValueError("it is damaged, or holds something else")
        digest = hashlib.sha256(keys.numpy().tobytes() + starts.numpy().tobytes()).hexdigest()
        return Shard(keys.numpy(), starts.numpy(), features, digest)


def _heads(keys: np.ndarray) -> np.ndarray:
    """The first 8 bytes of keys [n, 16], as numbers [n] to sort by."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)
