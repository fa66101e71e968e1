"""Triton kernel of `drop_features`: four words of a counter decide on four features, and nothing but x is read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 512


@triton.jit
def _drop(x_ptr, out_ptr, element, valid, word, threshold, scale):
    values = tl.load(x_ptr + element, mask=valid, other=0.0).to(tl.float32) * scale
    kept = (word >> 8) >= threshold.to(tl.uint32)
    tl.store(out_ptr + element, tl.where(kept, values, 0.0), mask=valid)


@triton.jit(do_not_specialize=["count", "length", "seed", "stream", "threshold"])
def dropout_kernel(
    x_ptr, out_ptr, row_ids_ptr, layer_ptr,
    count, length, seed, stream, threshold, scale,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`count` groups of four features; x is [R, length, D] without gaps."""
    groups: tl.constexpr = (D + 3) // 4
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = index < count
    place, group = index // groups, (index % groups).to(tl.int32)  # place: row * length + position
    row, position = place // length, (place % length).to(tl.int32)
    row_id = tl.load(row_ids_ptr + row, mask=valid, other=0)
    layer = tl.load(layer_ptr).to(tl.uint32)
    c0 = position.to(tl.uint32) * groups + group.to(tl.uint32)
    c1 = layer * 65536 + stream.to(tl.uint32)
    c2, c3 = row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed.to(tl.int64), c0, c1, c2, c3)  # a small seed comes in 32 bits
    element = place * D + group
    _drop(x_ptr, out_ptr, element, valid, w0, threshold, scale)
    _drop(x_ptr, out_ptr, element + groups, valid & (group + groups < D), w1, threshold, scale)
    _drop(x_ptr, out_ptr, element + 2 * groups, valid & (group + 2 * groups < D), w2, threshold, scale)
    _drop(x_ptr, out_ptr, element + 3 * groups, valid & (group + 3 * groups < D), w3, threshold, scale)


def launch(x: Tensor, row_ids: Tensor, layer: Tensor, seed: int, stream: int, threshold: int, scale: float) -> Tensor:
    """As the reference in `dropout.py`."""
    x, (R, S, D) = x.contiguous(), x.shape
    out, count = torch.empty_like(x), R * S * triton.cdiv(D, 4)
    if count:
        dropout_kernel[(triton.cdiv(count, _TILE),)](
            x, out, row_ids.contiguous(), layer, count, S, seed, stream, threshold, scale, **kernel_options(D)
        )
    return out


def kernel_options(D: int) -> dict:
    """Compile-time options of the kernel, as the launcher and the compile tests use them."""
    return {"D": D, "TILE": _TILE, "num_warps": 4, "enable_fp_fusion": False}
