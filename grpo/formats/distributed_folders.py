"""Read `torch.distributed.checkpoint` folders that may come from a stranger.

The library reads a folder's `.metadata` by plain pickle and its non-tensor entries with `weights_only=False`, so that a
crafted folder runs code. Here `.metadata` goes through an unpickler that knows the few classes which the library's own
writer puts there, every entry through `weights_only=True`, and file names cannot leave the folder.
"""

import io
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from grpo.config import UserError

METADATA_NAME = ".metadata"

_ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},  # and dtypes
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # where Python 3.13 keeps it
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _ADMITTED.get(module, ()):
            raise _RefusedError(f"{module}.{name}")
        return super().find_class(module, name)


class _RefusedError(Exception):
    """The pickle asks for something that no checkpoint writer puts there; the message names it."""


def read_metadata(folder: str | Path) -> Metadata:
    """The contents of a checkpoint folder: names, shapes, and where in which file each piece is.

    Raises a UserError: no such file, damaged, asking for anything but checkpoint metadata, naming files elsewhere, or
    promising tensors that its files do not hold.
    """
    path = Path(folder) / METADATA_NAME
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        _check_files_inside(metadata)
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                _check_stored_whole(name, entry, metadata)
    except OSError as error:
        raise UserError(f"{folder} is not a readable checkpoint folder: {METADATA_NAME}: {error.strerror}.") from None
    except _RefusedError as error:
        advice = "do not trust this folder; ask its author for a .safetensors file."
        raise UserError(f"{path} asks to run {error}, which no checkpoint contains: {advice}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path} is damaged ({type(error).__name__}): take another checkpoint.") from error
    return metadata


def _check_files_inside(metadata: Metadata) -> None:
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("not checkpoint metadata")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path or not info.relative_path.endswith(".distcp"):
            raise _RefusedError(f"a file at {info.relative_path!r}")
        if info.offset < 0 or info.length < 0 or getattr(info, "transform_descriptors", None):
            raise pickle.UnpicklingError("impossible piece")


def _check_stored_whole(name: str, entry: TensorStorageMetadata, metadata: Metadata) -> None:
    """A tensor is stored once and whole: nothing is read that was not written, nothing larger than its file."""
    covered = 0
    for chunk in entry.chunks:
        places = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if not all(offset >= 0 and size >= 0 and offset + size <= length for offset, size, length in places):
            raise pickle.UnpicklingError(f"impossible piece of {name}")
        elements = math.prod(chunk.sizes)
        stored = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
        if elements and (stored is None or stored.length < elements * entry.properties.dtype.itemsize):
            raise pickle.UnpicklingError(f"{name} is not stored")
        covered += elements
    if covered != math.prod(entry.size):
        raise pickle.UnpicklingError(f"{name} is not stored whole")


class SafeFileSystemReader(dcp.FileSystemReader):
    """A storage reader whose `metadata` was read by `read_metadata` and whose files were found complete.

    Raises a UserError as `read_metadata`, and where shard files are missing or too short.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder)
        sizes = {path.name: path.stat().st_size for path in Path(folder).glob("*.distcp")}
        pieces = [(info.relative_path, info.offset + info.length) for info in self.metadata.storage_data.values()]
        if missing := {name for name, end in pieces if sizes.get(name, -1) < end}:
            raise UserError(f"{folder} is incomplete: {', '.join(sorted(missing))} missing or too short.")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata


class _SafeLoadPlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()  # the parent unpickles anything: it gets only what was written here
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def safe_load(state_dict: dict[str, Any], reader: SafeFileSystemReader, *, no_dist: bool = False) -> None:
    """`torch.distributed.checkpoint.load` in place, without trusting the folder.

    Raises a UserError: names or shapes that the folder does not have, or damaged shards.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
            dcp.load(state_dict, storage_reader=reader, planner=_SafeLoadPlanner(), no_dist=no_dist)
    except dcp.api.CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        cause = str(failure[0]).strip().partition("\n")[0]
        raise UserError(f"Cannot load {reader.path} (rank {rank}): {cause}") from error


def read_tensors(folder: str | Path, *, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, which is cut off; whole, on the CPU, read by this process alone.

    Raises a UserError as `SafeFileSystemReader` and `safe_load`.
    """
    reader = SafeFileSystemReader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    safe_load(tensors, reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
