"""Whole state dicts in and out of a sharded model."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict


def load_full_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None, *, device: torch.device | None = None
) -> None:
    """Give a parallelized model its weights, all on rank 0; the other ranks pass None. Raises if they are not its own.

    A model that was built on the meta device is allocated on `device` first, each rank its own shards only, so that no
    rank but the first ever holds the whole model. Modules with buffers outside the state dict rebuild them in `_apply`.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model.to_empty(device=device or torch.device("cpu"))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, dict(state_dict or {}), options=options)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights on rank 0's CPU, not copied if they are there; other ranks take part and get an empty dict."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
