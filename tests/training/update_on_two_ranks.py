"""Run by torchrun on two ranks: one optimizer step of four micro-batches on a sharded model, in each dropout mode.

Writes to the file named on the command line, one for each rank, for each mode: how often gradients were reduced after
each micro-batch, and how far the step's gradients are from those of one process without sharding.
"""

import json
import sys
from pathlib import Path

import torch
from torch.profiler import profile

from grpo.config import Objective, Rollout, Schedule, Training
from grpo.data import ImageBatch
from grpo.kernels import Draw
from grpo.models import ClassCondition
from grpo.parallel import World, distributed
from grpo.rollout import TeacherForcedRollout
from grpo.training import PolicyUpdate
from tests.parallel.toy import CONFIG, make_model, make_parallel, relative_error

IMAGES, GROUP = 8, 4
REDUCTIONS = ("c10d::_reduce_scatter_base_", "c10d::reduce_scatter_", "c10d::reduce_scatter_tensor_coalesced_")


class KeepGradients:
    """Stands in for the optimizer."""

    gradients: dict[str, torch.Tensor]

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> dict[str, float]:
        named = self.model.named_parameters()
        self.gradients = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in named}
        return {}


def step(model: torch.nn.Module, world: World, mode: str) -> tuple[list[int], dict[str, torch.Tensor]]:
    """(reductions of each micro-batch, gradients) of one step on this rank's share of the images."""
    ids = torch.arange(IMAGES)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(CONFIG.vocab_size, (IMAGES, CONFIG.block_size), generator=generator)
    advantages = torch.randn(IMAGES, GROUP, generator=generator)
    mine = ids.chunk(world.size)[world.rank]
    batch = ImageBatch(torch.zeros(len(mine), 0), ClassCondition(mine % CONFIG.num_classes), mine, mine)
    objective, training = Objective(aux_ce_weight=0.1), Training(micro_batch_size=1, dropout_mode=mode)
    sizes = Rollout(batch_size=IMAGES, num_generations=GROUP)
    schedule = Schedule.of(rollout=sizes, training=training, objective=objective, ranks=world.size)
    shared = {"draw": Draw(), "schedule": schedule}
    rollout = TeacherForcedRollout(model, lambda part: codes[part.sample_ids], sizes, **shared)
    kept = KeepGradients(model)
    update = PolicyUpdate(model, kept, objective=objective, rollout=sizes, **shared)
    reductions = []
    for part in batch.parts(schedule.images_per_part):
        trajectory = rollout(part)
        trajectory.advantages = advantages[part.sample_ids]
        with profile() as profiler:
            update(trajectory)
        reductions.append(sum(event.count for event in profiler.key_averages() if event.key in REDUCTIONS))
    return reductions, kept.gradients


def main() -> None:
    """Both steps of each mode, one after the other."""
    outcomes = {}
    with distributed(60) as world:
        alone = World(rank=0, size=1, local_rank=0, local_size=1, device=world.device)
        for mode in ("eval", "train", "twice"):
            reductions, sharded = step(make_parallel(world), world, mode)
            _, whole = step(make_model(), alone, mode)
            error = max(float(relative_error(sharded[name], whole[name])) for name in whole)
            outcomes[mode] = {"reductions": reductions, "error": error}
        Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
