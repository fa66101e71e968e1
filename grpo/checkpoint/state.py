"""What of a run goes into a checkpoint as tensors: one flat dict by name, without regard to the number of ranks."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from grpo.config import UserError
from grpo.formats import ShardReader, load_shards
from grpo.parallel import reshard

# Flat names, `state.<parameter>.exp_avg`, do not depend on the order of parameters or groups.
_OPTIONS = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)


class ExtraState(Protocol):
    """What a run goes on from besides its model, optimizer and data, e.g. a moving average or a discriminator.

    It may also have `state_dict()` and `load_state_dict(state)`, of what JSON can hold and is the same on every rank.
    """

    def state_tensors(self) -> dict[str, Tensor]:
        """The live tensors by name, DTensors or the same on every rank; a checkpoint is loaded into them in place."""
        ...


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, ExtraState] | None = None
) -> dict[str, Tensor]:
    """The tensors of a run, sharded as they are; the live ones, not copies.

    `model.<parameter>`, `optimizer.state.<parameter>.<quantity>` and `extra.<name>.<key>`. Hyper-parameters of the
    optimizer are not state: they come from the recipe and its schedule.
    """
    return {
        **{f"model.{name}": tensor for name, tensor in model_tensors(model).items()},
        **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(model, optimizer).items()},
        **{
            f"extra.{name}.{key}": tensor
            for name, state in (extra or {}).items()
            for key, tensor in state.state_tensors().items()
        },
    }


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live weights of a parallelized model by name, sharded as they are; of one with an adapter, only that."""
    reshard(model)  # a forward without backward may have left parameters gathered
    trained_only = getattr(model, "adapter", None) is not None
    options = state_dict.StateDictOptions(ignore_frozen_params=trained_only)
    return cast(dict[str, Tensor], state_dict.get_model_state_dict(model, options=options))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The live state of the optimizer of a parallelized model, as `state.<parameter>.<quantity>`."""
    reshard(model)
    if not optimizer.state:
        _optimizer_entries(model, optimizer)  # allocates it by a step of size zero,
        for state in optimizer.state.values():
            state["step"].zero_()  # which must not count
    entries = _optimizer_entries(model, optimizer)
    parts = (_parts(name, entries[name]) for name in entries if name.startswith("state."))
    return {name: tensor for part in parts for name, tensor in part.items()}


def load_tensors(tensors: dict[str, Tensor], reader: ShardReader) -> None:
    """Overwrite the live tensors of a run by a checkpoint's, resharding as needed.

    Raises a UserError if the checkpoint is of another model, optimizer or recipe, or damaged.
    """
    entries = reader.metadata.state_dict_metadata
    stored = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    expected, found = set(tensors), set(stored)
    if expected != found:
        missing, superfluous = sorted(expected - found), sorted(found - expected)
        name = (missing or superfluous)[0]
        kind, verb = "recipe" if name.startswith("extra.") else "model", "lacks" if missing else "has"
        raise UserError(
            f"{reader.path} is a checkpoint of another {kind}: it {verb} {name}, unlike this run "
            f"({len(missing) + len(superfluous)} names differ). Use the recipe that wrote it, or start anew from its "
            "weights by model.checkpoint."
        )
    if other := [name for name, tensor in tensors.items() if stored[name].properties.dtype != tensor.dtype]:
        dtypes = f"{stored[other[0]].properties.dtype}, not {tensors[other[0]].dtype}"
        raise UserError(f"{reader.path} is a checkpoint of another recipe: {other[0]} is {dtypes}")
    load_shards(tensors, reader)


def _parts(name: str, state: Tensor) -> dict[str, Tensor]:
    """A tensor by its name; of one in blocks of 8 bits (torchao's `OptimState8bit`) its codes and scales.

    Scales are cut over ranks like the rows whose blocks they belong to, see `grpo.parallel.low_bit`.
    """
    local: Any = state.to_local() if isinstance(state, DTensor) else state
    if not hasattr(local, "codes"):
        return {name: state}
    in_rows = state.numel() // len(state) % local.block_size == 0  # whole blocks in each row
    parts = {f"{name}.codes": local.codes}
    parts[f"{name}.scale"] = local.scale.view(len(local), -1) if in_rows else local.scale
    if isinstance(state, DTensor):
        rows = len(state) if in_rows else state.numel() // local.block_size
        for key, rows_of_all in zip(parts, (len(state), rows), strict=True):
            whole = torch.empty(rows_of_all, *parts[key].shape[1:], device="meta")
            parts[key] = DTensor.from_local(
                parts[key], state.device_mesh, state.placements, shape=whole.shape, stride=whole.stride()
            )
    return parts


def _optimizer_entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return state_dict.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
