"""What of a model and its optimizer goes into a checkpoint, by name and without regard to the number of ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict

from grpo.config import UserError
from grpo.formats import ShardReader, load_shards
from grpo.parallel import reshard

# Flat names, `state.<parameter>.exp_avg`, do not depend on the order of parameters or groups.
_OPTIONS = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Weights and optimizer state, sharded as they are; the tensors are the live ones, not copies.

    {"model": by parameter name, "optimizer": by `state.<parameter>.<quantity>`}. Hyper-parameters of the optimizer are
    not state: they come from the recipe and its schedule.
    """
    weights, entries = _live_entries(model, optimizer)
    return {"model": weights, "optimizer": {name: entries[name] for name in entries if name.startswith("state.")}}


def load_training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, reader: ShardReader) -> None:
    """Overwrite weights and optimizer state by a checkpoint's, resharding as needed.

    Raises a UserError if the checkpoint is of another model or optimizer, or damaged.
    """
    weights, entries = _live_entries(model, optimizer)
    state = {name: entries[name] for name in entries if name.startswith("state.")}
    expected = {f"model.{name}" for name in weights} | {f"optimizer.{name}" for name in state}
    found = set(reader.metadata.state_dict_metadata)
    if expected != found:
        missing, superfluous = sorted(expected - found), sorted(found - expected)
        difference = f"lacks {missing[0]}" if missing else f"has {superfluous[0]}, which the model lacks"
        raise UserError(
            f"{reader.path} is a checkpoint of another model: it {difference} "
            f"({len(missing) + len(superfluous)} names differ). Use the recipe that wrote it."
        )
    load_shards({"model": weights, "optimizer": state}, reader)
    entries |= state
    state_dict.set_state_dict(model, [optimizer], model_state_dict=weights, optim_state_dict=entries, options=_OPTIONS)


def _live_entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    reshard(model)  # a forward without backward may have left parameters gathered
    if not optimizer.state:
        state_dict.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)  # allocates it by a step of size zero,
        for state in optimizer.state.values():
            state["step"].zero_()  # which must not count
    return state_dict.get_state_dict(model, [optimizer], options=_OPTIONS)
