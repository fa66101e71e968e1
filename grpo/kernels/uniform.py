"""Uniform random numbers that depend on a seed and a row's id only."""

import torch
from torch import Tensor

from grpo.kernels.philox import philox


def philox_uniform(row_ids: Tensor, count: int, *, seed: int, step: int = 0) -> Tensor:
    """`count` fp32 numbers in [0, 1) for each of `row_ids` [N] int64: [N, count].

    Counters are those of `philox.py` with sample 0 and groups 0 .. ceil(count / 4) - 1; draws that use the same row
    ids for another purpose take another `step`.
    """
    groups = torch.arange(-(-count // 4), device=row_ids.device)
    row_ids = row_ids[:, None]
    counter = (groups, torch.full_like(row_ids, step), row_ids & 0xFFFFFFFF, row_ids >> 32 & 0xFFFFFFFF)
    words = torch.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)), dim=-1)  # [N, groups, 4]
    return (words.flatten(1)[:, :count] >> 8).to(torch.float32) * 2.0**-24  # 24 bits: exact in fp32, never 1
