"""AdamW with moments of 8 bits, by torchao (Dettmers et al. 2022, arXiv 2110.02861), on sharded parameters too."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from grpo.config import import_extra

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # numbers of a parameter below which moments stay in fp32, as in bitsandbytes


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """torchao's AdamW8bit for parameter groups; raises a UserError where it is not installed.

    A parameter's moments are in 8 bits on all ranks or on none, by its whole size, so that a checkpoint has the same
    tensors everywhere (the library decides on each rank by the shard: pytorch/ao#4912). torch's own Adafactor,
    which factors the second moment instead, refuses sharded parameters (torch 2.15).
    """
    base: Any = import_extra("torchao.optim", extra="low-bit", wanted_by="optimizer.name = adamw_8bit").AdamW8bit

    class AdamW8bit(base):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if not has_low_bit_state(p):
                return torch.zeros_like(p)
            if not isinstance(p, DTensor):
                return self._subclass_zeros(p, signed, BLOCK)
            shard = self._subclass_zeros(p.to_local(), signed, BLOCK)
            return DTensor.from_local(shard, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())

    return AdamW8bit(groups, block_size=BLOCK, **settings)


def has_low_bit_state(parameter: Tensor, *, ranks: int | None = None) -> bool:
    """Whether it is large enough, every rank has whole blocks of it, and their scales are cut like its rows.

    `ranks` share it; None asks the parameter, which is then sharded already.
    """
    rows, per_row = len(parameter), parameter.numel() // len(parameter)
    if ranks is None:
        ranks = _ranks_that_share(parameter)
    most = -(-rows // ranks)
    fewest = rows - (ranks - 1) * most  # of the last rank; the others have most
    if parameter.numel() < SMALLEST or fewest <= 0:
        return False
    return per_row % BLOCK == 0 or (rows % ranks == 0 and most * per_row % BLOCK == 0)


def moment_bytes(parameter: Tensor, shard: int, *, ranks: int, low_bit: bool) -> int:
    """Bytes of both moments of AdamW for a shard of so many numbers of a parameter that `ranks` share."""
    if low_bit and has_low_bit_state(parameter, ranks=ranks):
        return 2 * (shard + 4 * shard // BLOCK)  # codes, and a scale in fp32 for each block
    return 2 * 4 * shard


def _ranks_that_share(parameter: Tensor) -> int:
    if not isinstance(parameter, DTensor):
        return 1
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return next((size for placement, size in sizes if isinstance(placement, Shard)), 1)
