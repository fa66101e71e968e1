"""State dicts in and out of files: LlamaGen's layouts, safetensors, distributed checkpoint folders."""

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo.config import TransientError, UserError, reading
from grpo.formats.manifest import check_files, read_file
from grpo.formats.shards import WHOLE, read_tensors, shard_files, write_shards

Layout = Literal["auto", "llamagen", "safetensors", "distributed"]

_WRAPPERS = ("model", "module", "state_dict", "params")
_LAYOUT_OF_SUFFIX: dict[str, Layout] = {
    ".pt": "llamagen",
    ".pth": "llamagen",
    ".safetensors": "safetensors",
    "": "distributed",
}
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip
"""Of tensors in files of weights: what a network's numbers are stored as, and its counters and masks."""
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error)
CONSOLIDATED = "consolidated.pth"  # all weights of a checkpoint in one file that LlamaGen loads
RUN_STATE_NAME = "run_state.json"  # of a checkpoint folder
CHECKPOINT_FORMAT = 1  # in it, under "format"; another number where an older reader would misread what is there
_CONFIG = "config"  # in the metadata of a .safetensors file, and in RUN_STATE_NAME


def read_weights(path: str | os.PathLike[str], *, bare: bool = False, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in any layout in which such weights are published, on the CPU, in its own dtypes.

    - a pickle of `{"model" | "module" | "state_dict" | "params": weights, ...}` or of the weights; it may hold
      an `argparse.Namespace`, and nothing else that is not plain data;
    - a `.safetensors` file;
    - a folder of safetensors shards, as a run's checkpoints are, of which the entries under `model` are taken, or all
      tensors if nothing is there; else a folder with `consolidated.pth`. A manifest's checksums are compared;
    - a folder with `model.safetensors`, as a run's is at its end.

    `bare` insists that a pickle is the state dict itself, as LlamaGen's FSDP trainer writes it; `key` that it is under
    this key of a pickle, or that a `.safetensors` file holds it alone, and then a folder is refused.
    Raises a UserError: no such file, not weights, damaged, or unsafe to read.
    """
    path = Path(path)
    if path.is_dir() and key is not None:
        raise UserError(f"{path}: is a folder; give the file with the {key}")
    if path.is_dir():
        consolidated = path / CONSOLIDATED
        if not shard_files(path) and consolidated.is_file():
            check_files(path, [CONSOLIDATED])
            return _read_pickle(consolidated, bare=bare)
        check_files(path, [file.name for file in shard_files(path)])
        return _plain(path, read_tensors(path, prefix="model.") or read_tensors(path))
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the weights")
    if path.suffix == ".safetensors":
        with reading(f"{path}: not a readable .safetensors file"):
            return _plain(path, safetensors.torch.load_file(path))
    return _read_pickle(path, bare=bare, key=key)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The sizes, and names of classes, that were written with the weights by `save_weights` or with a checkpoint.

    None where there are none. Raises a UserError if they are damaged.
    """
    path = Path(path)
    in_folder = path / RUN_STATE_NAME
    is_checkpoint = os.path.lexists(in_folder)
    if path.is_dir() and not is_checkpoint:
        path = path / WHOLE
    try:
        if is_checkpoint:
            check_files(path, [RUN_STATE_NAME])
            state = json.loads(read_file(in_folder))
            config = state.get(_CONFIG)
            check_format(state, in_folder)
        elif path.suffix == ".safetensors" and path.is_file():
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_CONFIG)
            config = None if text is None else json.loads(text)
        else:
            return None
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        kind = f"readable {RUN_STATE_NAME}" if path.is_dir() else "readable .safetensors file"
        raise UserError(f"{path}: not a {kind} ({error})") from error
    if not isinstance(config, dict | None):
        raise UserError(f"{path}: the sizes in this file are damaged")
    return config


def check_format(state: Mapping[str, Any], file: str | os.PathLike[str]) -> None:
    """Raise a UserError if a checkpoint's run_state.json, read from `file`, is of another format than ours."""
    if (found := state.get("format")) != CHECKPOINT_FORMAT:
        raise UserError(
            f"{file}: the checkpoint has format {found}, this version of the project reads {CHECKPOINT_FORMAT}: use "
            "the version that wrote it, there `grpo convert` makes a .safetensors file that every version reads"
        )


def saved_fields(config: Any) -> list[str]:
    """Fields of a model's config that go with its weights: its sizes, and those marked as `saved`."""
    return [field.name for field in fields(config) if field.metadata.get("saved", field.compare)]


def saved_config(config: Any) -> dict[str, Any]:
    """Those fields of a model's config with their values."""
    return {name: getattr(config, name) for name in saved_fields(config)}


def _read_pickle(path: Path, *, bare: bool, key: str | None = None) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol: what matters is whether it can be read
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        reason = "not a checkpoint that torch can read, or a damaged one"
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"refused, reading it could run code: it holds {refused[1]}; ask its author for .safetensors"
        raise UserError(f"{path}: {reason}") from error
    if key is not None:
        content = content.get(key) if isinstance(content, Mapping) else None
    elif not bare and isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        form = "a bare state dict (model.from_fsdp)" if bare else f"a state dict, bare or under {', '.join(_WRAPPERS)}"
        form = form if key is None else f"a state dict under the key {key}"
        raise UserError(f"{path}: this checkpoint does not hold {form}")
    return _plain(path, content)


def _plain(path: Path, tensors: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """The same. Raises a UserError for what files may hold beside tensors of numbers that are all there."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: this checkpoint has a tensor by the name {name!r}, which is no text")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES or tensor.device.type != "cpu":
            kind = "quantized" if tensor.is_quantized else f"{tensor.layout} {tensor.dtype} on {tensor.device}"
            raise UserError(f"{path}: {name} is {kind.replace('torch.', '')}; save it as a dense tensor of floats")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: damaged, {name} has more elements than are stored")
    return dict(tensors)


def require_finite(path: object, tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError if a tensor has a number that is NaN or infinite; integers have none."""
    for name, tensor in tensors.items():
        tensor = tensor.float() if tensor.itemsize == 1 else tensor  # sums of 8-bit floats are not there
        if not tensor.is_floating_point() or tensor.sum().isfinite():  # ten times as fast as to look at each
            continue
        if not tensor.isfinite().all():  # else the sum alone was beyond the dtype
            raise UserError(f"{path}: {name} holds NaN or infinite numbers; take weights from before they diverged")


def save_weights(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], *, layout: Layout = "auto", config: Any = None
) -> None:
    """Write a state dict of whole tensors; what is at `path` is replaced only when the new one is complete.

    Args:
        layout: `llamagen` is a pickle of `{"model": weights}`, `distributed` a folder, which must not exist; `auto`
            follows the suffix: .pt and .pth, .safetensors, none for a folder.
        config: the model's sizes, a dataclass or what `read_config` has read. They go with the weights where the
            layout is safetensors, the only one with a place for them.

    Raises a UserError: an unknown suffix, a folder in the way, or what cannot be written, of which nothing is left.
    """
    path = Path(path)
    if layout == "auto" and path.suffix not in _LAYOUT_OF_SUFFIX:
        raise UserError(f"{path}: weights are written as .safetensors, .pt, .pth or a folder, not {path.suffix}")
    layout = _LAYOUT_OF_SUFFIX[path.suffix] if layout == "auto" else layout
    if path.is_dir() or (layout == "distributed" and path.exists()):
        raise UserError(f"{path} exists and is not overwritten; give another name for the weights")
    unfinished = path.with_name(f".{path.name}.unfinished")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(unfinished, tensors, layout=layout, config=config)
        os.replace(unfinished, path)
    except (OSError, SafetensorError, RuntimeError, dcp.api.CheckpointException) as error:  # torch's is a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
            unfinished.unlink()
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise TransientError(
            f"{path} could not be written: {reason}; free space there or give another place"
        ) from error


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a copy of each tensor that shares its memory with another one, which safetensors refuses."""
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    shared = {name for name, tensor in tensors.items() if uses[tensor.untyped_storage().data_ptr()] > 1}
    return {name: tensor.clone() if name in shared else tensor for name, tensor in tensors.items()}


def _write(path: Path, tensors: dict[str, Tensor], *, layout: Layout, config: Any) -> None:
    if layout == "safetensors":
        if config is not None and not isinstance(config, Mapping):
            config = saved_config(config)
        # One key: several would be written in an order that changes, and equal weights are to make equal files.
        metadata = {"format": "pt"} if config is None else {_CONFIG: json.dumps(config)}
        path.touch()
        mode = path.stat().st_mode  # the library makes a file that its owner alone can read
        safetensors.torch.save_file(_untied(tensors), path, metadata=metadata)
        path.chmod(mode)
    elif layout == "llamagen":
        torch.save({"model": tensors}, path)
    else:
        shutil.rmtree(path, ignore_errors=True)
        write_shards(path, {"model": tensors})
