"""A small training run to interrupt and to continue."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from grpo.checkpoint import CheckpointManager, ExtraState
from grpo.config import Checkpoint
from grpo.parallel import World, clip_grad_norm, full_state_dict
from tests.parallel.toy import loss_sum, make_batch, make_parallel

Training = tuple[nn.Module, torch.optim.Optimizer]


def start(world: World, **how) -> Training:
    """A parallelized model and AdamW with two parameter groups."""
    model = make_parallel(world, **how)
    groups = [[p for p in model.parameters() if p.ndim == ndim] for ndim in (1, 2)]
    return model, torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}], lr=1e-2)


def train(world: World, training: Training, steps: range) -> list[float]:
    """Optimizer steps on the batches of those steps; the gradient norms."""
    model, optimizer = training
    norms = []
    for step in steps:
        tokens, class_ids = (tensor.chunk(world.size)[world.rank] for tensor in make_batch(step))
        (loss_sum(model, tokens, class_ids) * world.size / 128).backward()
        norms.append(float(clip_grad_norm(model, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


class Extra:
    """A DTensor or plain tensor like a parameter, and a tensor that is the same on every rank."""

    def __init__(self, model: nn.Module, value: float) -> None:
        parameter = model.get_parameter("layers.0.attention.wo.weight").detach()
        self.tensors = {"sharded": value * parameter, "replicated": torch.arange(5.0) + value}

    def state_tensors(self) -> dict[str, Tensor]:
        return self.tensors

    def equals(self, other: "Extra") -> bool:
        """Equal bits; collective."""
        full = [[getattr(t, "full_tensor", lambda t=t: t)() for t in x.tensors.values()] for x in (self, other)]
        return all(torch.equal(*pair) for pair in zip(*full, strict=True))


def save(
    manager: CheckpointManager, training: Training, step: int, score: float | None = None, **extra: ExtraState
) -> None:
    model, optimizer = training
    manager.save(
        step,
        model=model,
        optimizer=optimizer,
        run_state={"step": step, "thirds": [step / 3]},
        extra=extra,
        score=score,
    )


def whole_state(training: Training) -> dict[str, Tensor]:
    """Weights and optimizer state by name, gathered on rank 0."""
    model, optimizer = training
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
    entries = get_optimizer_state_dict(model, optimizer, options=options)
    state = {name: value.clone() for name, value in entries.items() if name.startswith("state.")}
    return {**{name: value.clone() for name, value in full_state_dict(model).items()}, **state}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Equal names and equal bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@contextmanager
def managed(folder: str | Path, world: World, *, stage: Path = Path(".stage"), **config):
    """A checkpoint manager; shards only, all kept and written at once unless `config` says otherwise."""
    config = Checkpoint(**{"sharded": True, "async_save": False, **config})
    manager = CheckpointManager(folder, world=world, config=config, timeout_seconds=60, stage=stage)
    yield manager
    manager.close()
