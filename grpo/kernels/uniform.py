"""Uniform numbers that depend on a seed, a purpose and a row's number alone.

Packing (`philox.py`): the key is the seed, the counter's words are

    c0 = group      c1 = step      c2, c3 = row id, low word first

Number i of a row is word i % 4 of group i // 4.
"""

import torch
from torch import Tensor

from grpo.kernels.dispatch import use_triton
from grpo.kernels.philox import philox_stack, split_words


def philox_uniform(row_ids: Tensor, count: int, *, seed: int, step: int = 0, impl: str = "auto") -> Tensor:
    """`count` fp32 numbers in [0, 1) for each of `row_ids` [N] int64: [N, count]. One kernel on a GPU.

    Draws that use the same row ids for another purpose take another `step`, 0 .. 2^32 - 1 (`RandomStream`).

    Raises ValueError for a shape, dtype or step out of range.
    """
    if row_ids.ndim != 1 or row_ids.dtype != torch.int64:
        raise ValueError(f"expected row_ids [N] int64, not {list(row_ids.shape)} {row_ids.dtype}")
    if not 0 <= step < 1 << 32:
        raise ValueError(f"step is {step}; it must lie in 0 .. 2^32 - 1")
    return torch.ops.grpo.uniform(row_ids, count, seed, step, impl)


@torch.library.custom_op("grpo::uniform", mutates_args=())
def _uniform(row_ids: Tensor, count: int, seed: int, step: int, impl: str) -> Tensor:
    if use_triton(impl, op="uniform", device=row_ids.device, obstacle=None):
        from grpo.kernels.triton_uniform import launch

        with torch.cuda.device_of(row_ids):
            return launch(row_ids, count, seed, step)
    groups = torch.arange(-(-count // 4), device=row_ids.device)
    row_ids = row_ids[:, None]
    words = philox_stack((groups, torch.full_like(row_ids, step), *split_words(row_ids)), seed, dim=2)
    return (words.flatten(1)[:, :count] >> 8).to(torch.float32) * 2.0**-24  # 24 bits: exact in fp32, never 1


_uniform.register_fake(
    lambda row_ids, count, *_: torch.empty(len(row_ids), count, dtype=torch.float32, device=row_ids.device)
)
