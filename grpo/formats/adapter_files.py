"""LoRA adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

A matrix of the module `layers.0.attention.wo` is named `base_model.model.layers.0.attention.wo.lora_A.weight` there; in
a state dict here, `layers.0.attention.wo.lora_A.weight`.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from grpo.config import UserError, read_text, reading, require_regular
from grpo.formats.manifest import check_files
from grpo.formats.weight_files import require_finite, save_weights

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LARGEST_CONFIG = 2**20  # bytes
_PLAIN: dict[str, Any] = {
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "use_dora": False, "fan_in_fan_out": False,
    "lora_bias": False, "bias": "none",
}  # fmt: skip
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a model's LoRA adapter is: W x + alpha / rank * B A x in each of its linear layers called as in `targets`.

    Hu et al. 2021, arXiv 2106.09685.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str | None = None  # file of the weights that it belongs to
    rank_stabilized: bool = False  # the factor is alpha / sqrt(rank), arXiv 2312.03732

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def read_adapter(path: str | os.PathLike[str]) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter of a folder and its matrices by name, on the CPU, in fp32.

    Raises a UserError: not such a folder, damaged, or an adapter of a kind that is not known here.
    """
    path = Path(path)
    if not (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} is not a LoRA adapter: it has no {ADAPTER_CONFIG}; give the folder of a PEFT adapter")
    check_files(path, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])  # of a checkpoint
    with reading(f"{path / ADAPTER_CONFIG} cannot be read"):
        config = json.loads(read_text(path / ADAPTER_CONFIG, largest=_LARGEST_CONFIG))
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise ValueError('its peft_type is not "LORA"')
        if special := [key for key, plain in _PLAIN.items() if config.get(key, plain) not in (plain, None, {}, [])]:
            raise ValueError(f"adapters with {special[0]} are not known here; merge it with PEFT")
        rank, alpha = config["r"], config["lora_alpha"]
        if type(rank) is not int or not 0 < rank < 2**20 or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
            raise ValueError("r must be a whole number above 0 and lora_alpha a number above 0")
        base = config.get("base_model_name_or_path")
    with reading(f"{path / ADAPTER_WEIGHTS} cannot be read"):
        require_regular(path / ADAPTER_WEIGHTS)
        stored = safetensors.torch.load_file(path / ADAPTER_WEIGHTS)
        tensors = {name.removeprefix(_PREFIX): tensor.float() for name, tensor in stored.items()}
        _require_pairs(tensors, rank)
    require_finite(path / ADAPTER_WEIGHTS, tensors)
    targets = sorted({name.removesuffix(_A).rpartition(".")[2] for name in tensors if name.endswith(_A)})
    stabilized = bool(config.get("use_rslora"))
    adapter = Adapter(
        rank=rank, alpha=alpha, targets=tuple(targets), base=base and str(base), rank_stabilized=stabilized
    )
    return adapter, tensors


def save_adapter(folder: str | os.PathLike[str], adapter: Adapter, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write an adapter's matrices, by their names in a state dict, and what it is; the files. Raises a UserError."""
    folder = Path(folder)
    save_weights(folder / ADAPTER_WEIGHTS, {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": adapter.base, "inference_mode": True,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": list(adapter.targets), "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": adapter.rank_stabilized, "init_lora_weights": True,
    }  # fmt: skip
    partial = folder / f".{ADAPTER_CONFIG}.partial"
    with reading(f"{folder / ADAPTER_CONFIG} cannot be written", remedy="free space there or give another place"):
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / ADAPTER_CONFIG)
    return [folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG]


def merged(weights: Mapping[str, Tensor], adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with an adapter's matrices multiplied out: W + scale B A, in fp32, in W's dtype.

    Raises a UserError: a matrix belongs to no weight of the state dict, or its shape does not fit.
    """
    result = dict(weights)
    for name, down in tensors.items():
        if not name.endswith(_A):
            continue
        target, up = f"{name.removesuffix(_A)}.weight", tensors[name.removesuffix(_A) + _B]
        weight = weights.get(target)
        if weight is None:
            raise UserError(f"the LoRA adapter has {name}, and the weights have no {target}: it is another model's")
        if weight.shape != (len(up), down.shape[1]):
            shapes = f"{[len(up), down.shape[1]]}, the weights {[*weight.shape]}"
            raise UserError(f"the LoRA adapter's product for {target} is {shapes}: it is another model's")
        result[target] = add_product(weight, up, down, scale=adapter.scale)
    return result


def add_product(weight: Tensor, up: Tensor, down: Tensor, *, scale: float) -> Tensor:
    """W + scale B A [out, in], computed in fp32, in W's dtype; B is `up` [out, rank], A `down` [rank, in]."""
    return weight.float().addmm(up.float(), down.float(), alpha=scale).to(weight.dtype)


def _require_pairs(tensors: Mapping[str, Tensor], rank: int) -> None:
    """Raise a ValueError unless the tensors are pairs of matrices A [rank, in] and B [out, rank]."""
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise ValueError(f"{name} is no matrix of a LoRA adapter")
        if f"{match[1]}{_B if match[2] == 'A' else _A}" not in tensors:
            raise ValueError(f"{name} has no counterpart")
        if tensor.ndim != 2 or tensor.shape["AB".index(match[2])] != rank:
            raise ValueError(f"{name} is {[*tensor.shape]}, and r is {rank}")
    if not tensors:
        raise ValueError("it holds no matrices")
