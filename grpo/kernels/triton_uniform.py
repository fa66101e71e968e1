"""Triton kernel of `philox_uniform`: four numbers from each counter, and nothing but the rows' numbers is read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 256


@triton.jit
def _store(out_ptr, element, valid, word):
    tl.store(out_ptr + element, (word >> 8).to(tl.float32) * (1.0 / 16777216), mask=valid)


@triton.jit(do_not_specialize=["groups", "count", "columns", "seed", "step"])
def uniform_kernel(row_ids_ptr, out_ptr, groups, count, columns, seed, step, TILE: tl.constexpr):
    """`groups` of four numbers, `count` of them a row; out is [rows, columns]."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = index < groups
    row, group = index // count, index % count
    row_id = tl.load(row_ids_ptr + row, mask=valid, other=0)
    c0, c1 = group.to(tl.uint32), tl.zeros_like(group).to(tl.uint32) + step.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed.to(tl.int64), c0, c1, row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32))
    column = 4 * group
    element = row * columns + column
    _store(out_ptr, element, valid & (column < columns), w0)
    _store(out_ptr, element + 1, valid & (column + 1 < columns), w1)
    _store(out_ptr, element + 2, valid & (column + 2 < columns), w2)
    _store(out_ptr, element + 3, valid & (column + 3 < columns), w3)


def launch(row_ids: Tensor, columns: int, seed: int, step: int) -> Tensor:
    """As the reference in `uniform.py`."""
    out = torch.empty(len(row_ids), columns, dtype=torch.float32, device=row_ids.device)
    count = triton.cdiv(columns, 4)
    groups = len(row_ids) * count
    if groups:
        grid = (triton.cdiv(groups, _TILE),)
        uniform_kernel[grid](row_ids.contiguous(), out, groups, count, columns, seed, step, **kernel_options())
    return out


def kernel_options() -> dict:
    """Compile-time options of the kernel, as the launcher and the compile tests use them."""
    return {"TILE": _TILE, "num_warps": 4}
