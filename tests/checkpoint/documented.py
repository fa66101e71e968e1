"""A reader of checkpoints written from docs/durability.md alone: numpy, safetensors' own reader, JSON and checksums."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open


def read_as_documented(folder: Path) -> dict[str, np.ndarray]:
    """The whole tensors of a checkpoint by name; asserts that what is there is what the page says."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() | {"manifest.json"} == {file.name for file in folder.iterdir()}
    pieces: dict[str, list[tuple[list[int], np.ndarray]]] = {}
    for name, known in manifest.items():
        content = (folder / name).read_bytes()
        assert known == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if not name.startswith("shard-"):
            continue
        with safe_open(folder / name, framework="np") as shard:
            places = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
            for tensor in shard.keys():  # noqa: SIM118, it is no mapping
                pieces.setdefault(tensor, []).append((places[tensor]["saved_offsets"], shard.get_tensor(tensor)))
    return {name: _whole(parts) for name, parts in pieces.items()}


def _whole(parts: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """Each piece at its offsets, each element once."""
    ends = [[start + length for start, length in zip(at, piece.shape, strict=True)] for at, piece in parts]
    size = tuple(max(sides) for sides in zip(*ends, strict=True))
    tensor, count = np.zeros(size, parts[0][1].dtype), np.zeros(size, int)
    for (at, piece), end in zip(parts, ends, strict=True):
        place = tuple(map(slice, at, end))
        tensor[place] = piece
        count[place] += 1
    assert (count == 1).all()
    return tensor
