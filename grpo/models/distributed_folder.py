"""Weights in a folder of `torch.distributed.checkpoint`, read without trusting it.

The folder's `.metadata` is a pickle that torch itself reads without restriction, and its entries that are not tensors
are pickles too. Here the first goes through an unpickler that admits nothing but the classes of such metadata, and
only tensors are read, which torch does with `weights_only=True`.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from grpo.config import UserError

_DAMAGED = (CheckpointException, EOFError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA_NAMES = {
    *((_METADATA_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA_MODULE, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles the metadata of a distributed checkpoint and refuses everything else before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _METADATA_NAMES:
            raise pickle.UnpicklingError(f"refused {module}.{name}")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """A `FileSystemReader` whose metadata cannot run code. It is safe for tensors only: ask it for nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            metadata = MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not the metadata of a checkpoint")
        return metadata


def read_distributed_folder(folder: Path) -> dict[str, Tensor]:
    """The model's weights in a distributed checkpoint, on the CPU, without a process group.

    Those are the entries under `model`, without that prefix, or all tensors if nothing is under `model`.

    Raises:
        UserError: the folder is unsafe or damaged.
    """
    try:
        reader = SafeReader(folder)
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        names = [name for name in tensors if name.startswith("model.")] or list(tensors)
        tensors = {name: tensors[name] for name in names}
        with warnings.catch_warnings(action="ignore"):  # that there is no process group is intended
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{folder}/.metadata: not the metadata of a distributed checkpoint ({error})") from error
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{folder}: damaged checkpoint folder ({reason}); take another or save it again") from error
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def write_distributed_folder(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write weights under `model`, as a training run does, from one process."""
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"model": dict(state_dict)}, checkpoint_id=folder, no_dist=True)
