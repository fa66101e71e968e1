"""Folders of safetensors shards: what `torch.distributed.checkpoint` writes and reads without a pickle.

Every rank writes the pieces of tensors that it holds into a file of its own; the file's metadata says where in its
tensor each piece belongs (the library's `HuggingFaceStorageWriter`). A folder may come from a stranger: reading one
executes nothing, follows no link out of it, and gives no memory that the files do not fill.
"""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from grpo.config import UserError
from grpo.formats.manifest import SHARDS, open_file

PICKLED_METADATA = ".metadata"
"""What makes a folder of the library's older layout, which cannot be read without unpickling."""

WHOLE = "model.safetensors"
"""All weights in one file: of a run at its end, and by the custom of others."""

_PLACES = "DCP_SHARDING_INFO"  # in the metadata of a shard, as the library writes it

Pieces = Iterable[tuple[tuple[int, ...], tuple[int, ...]]]  # offsets and sizes


def write_shards(folder: str | Path, tensors: Mapping[str, Any], *, group: dist.ProcessGroup | None = None) -> None:
    """Write tensors, sharded as they are, by their names joined by dots, and sync them to the disk.

    Collective over `group`; without one this process writes all of them alone. A tensor that several ranks hold whole
    is written once. Raises a `dcp.CheckpointException`.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings(action="ignore"):  # that there is no process group may be intended
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def shard_files(folder: str | Path) -> list[Path]:
    """The shards of a folder: what several ranks have written, or model.safetensors, or all .safetensors files."""
    folder = Path(folder)
    whole = [file for file in [folder / WHOLE] if file.exists()]  # a run's folder has other weights beside it
    return sorted(folder.glob(SHARDS)) or whole or sorted(folder.glob("*.safetensors"))


def rank_shards(folder: str | Path, rank: int) -> list[Path]:
    """What one rank has written; nothing, if it holds no piece of a tensor."""
    return list(Path(folder).glob(f"shard-{rank + 1:05d}-*.safetensors"))


class ShardReader(HuggingFaceStorageReader):
    """A storage reader for shards whose `metadata` was checked: every tensor is there once and whole.

    Raises a UserError: no shards, a damaged one, a link, or tensors that are stored in part, or twice.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder))
        folder = Path(folder)
        try:
            if not (files := shard_files(folder)):
                raise UserError(_no_shards(folder))
            self.metadata = Metadata({}, storage_data={})
            for file in files:
                self._add_pieces(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be read: {_first_line(error)}; take another checkpoint") from error
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:  # crafted sharding info
            raise UserError(f"{folder} is damaged ({type(error).__name__}): take another checkpoint") from error
        for name, entry in self.metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), "of tensors alone, by `_add_pieces`"
            pieces = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            if not tiles(tuple(entry.size), pieces):
                raise UserError(f"{folder} is damaged: {name} is stored in part, or twice; take another checkpoint")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata

    def _add_pieces(self, path: Path) -> None:
        """Note the pieces in a file, and where in their tensors they belong."""
        open_file(path).close()
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {}).get(_PLACES, "null"))
            for name in file.keys():  # noqa: SIM118, it is no mapping
                stored = file.get_slice(name)
                sizes = torch.Size(stored.get_shape())
                dtype = (stored[:0] if sizes else file.get_tensor(name)).dtype
                offsets = torch.Size(places[name]["saved_offsets"]) if places else torch.Size([0] * len(sizes))
                end = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
                entry = self.metadata.state_dict_metadata.setdefault(
                    name, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(end), [])
                )
                assert isinstance(entry, TensorStorageMetadata), "of tensors alone"
                if entry.properties.dtype != dtype:
                    raise ValueError("pieces of several dtypes")
                entry.size = torch.Size(max(pair) for pair in zip(entry.size, end, strict=True))
                entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
                self.metadata.storage_data[MetadataIndex(name, offsets)] = _Place(str(path))


class _Place(NamedTuple):
    """Where the library's reader looks for a piece."""

    relative_path: str


def tiles(size: tuple[int, ...], pieces: Pieces) -> bool:
    """Whether the pieces cover a tensor of that size exactly, none of them overlapping another."""
    pieces = sorted((offsets, sizes) for offsets, sizes in pieces if math.prod(sizes))
    inside = all(
        len(offsets) == len(sizes) == len(size)
        and all(offset >= 0 and offset + extent <= length for offset, extent, length in zip(*piece, size, strict=True))
        for piece in pieces
        for offsets, sizes in [piece]
    )
    if not inside or sum(math.prod(sizes) for _, sizes in pieces) != math.prod(size):
        return False
    # Sorted, pieces cut along one dimension touch their neighbours only; any other cut is compared pair by pair.
    along = [dim for dim in range(len(size)) if any(piece[0][dim] for piece in pieces)]
    pairs = pairwise(pieces) if len(along) <= 1 else ((a, b) for n, a in enumerate(pieces) for b in pieces[:n])
    return not any(_overlap(*pair) for pair in pairs)


def _overlap(one: tuple[tuple[int, ...], ...], other: tuple[tuple[int, ...], ...]) -> bool:
    return all(a < b + other_size and b < a + size for a, size, b, other_size in zip(*one, *other, strict=True))


def load_shards(tensors: Mapping[str, Any], reader: ShardReader, *, alone: bool = False) -> None:
    """Fill tensors in place from shards, resharding as needed. Collective, unless `alone`.

    Raises a UserError: a tensor is not there, has another shape or dtype, or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant
            dcp.load(dict(tensors), storage_reader=reader, no_dist=alone)
    except dcp.api.CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        raise UserError(f"Cannot load {reader.path} (rank {rank}): {_first_line(failure[0])}") from error


def read_tensors(folder: str | Path, *, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, which is cut off; whole, on the CPU, read by this process alone.

    Raises a UserError as `ShardReader` and `load_shards`.
    """
    reader = ShardReader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    load_shards(tensors, reader, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _no_shards(folder: Path) -> str:
    if (folder / PICKLED_METADATA).exists():
        return (
            f"{folder} keeps its tensors behind a pickle ({PICKLED_METADATA}), which may run code when it is read. If "
            "you trust it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth"
        )
    return f"{folder} has no .safetensors files: give a checkpoint folder, such as checkpoints/step-000100"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
