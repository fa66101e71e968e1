"""Triton kernels of `norm_linear` and `linear_add`: one program for each tile of the result.

A program streams its part of the matrix once. The rows are few and come from the cache.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.dispatch import arrivals


@triton.jit
def norm_linear_kernel(
    x_ptr, squares_ptr, norm_ptr, weight_ptr, up_ptr, out_ptr, N, S, stride_x, stride_weight, stride_up, eps,
    D: tl.constexpr, F: tl.constexpr, TILE_S: tl.constexpr, TILE_N: tl.constexpr, TILE_F: tl.constexpr,
    TILE_D: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    features = tl.program_id(0) * TILE_F + tl.arange(0, TILE_F)
    dtype = x_ptr.dtype.element_ty
    parts = tl.arange(0, TILE_S)
    inside = (rows < N)[:, None]
    squares = tl.load(squares_ptr + rows[:, None] * S + parts[None, :], mask=inside & (parts < S)[None, :], other=0.0)
    # A row's norm is one factor, and cheapest on the product. Only fp16 has too small a range for rows without it.
    LATE: tl.constexpr = dtype != tl.float16
    inverse = 1.0
    if not LATE:
        inverse = (1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps))[:, None]
    product = tl.zeros((TILE_N, TILE_F), tl.float32)
    up_product = tl.zeros((TILE_N, TILE_F), tl.float32)
    for start in range(0, D, TILE_D):
        k = start + tl.arange(0, TILE_D)
        mask = (features < F)[:, None] & (k < D)[None, :]
        weight = tl.load(weight_ptr + features[:, None] * stride_weight + k[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_x + k[None, :], mask=inside & (k < D)[None, :], other=0.0)
        norm = tl.load(norm_ptr + k, mask=k < D, other=0.0)
        if not LATE:
            x = (x.to(tl.float32) * inverse).to(dtype)
        x = x * norm[None, :]
        product = tl.dot(x, tl.trans(weight), product, input_precision=PRECISION)
        if GATED:
            up = tl.load(up_ptr + features[:, None] * stride_up + k[None, :], mask=mask, other=0.0)
            up_product = tl.dot(x, tl.trans(up), up_product, input_precision=PRECISION)
    if LATE:
        inverse = (1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps))[:, None]
        product *= inverse
        up_product *= inverse
    if GATED:
        gate = product.to(dtype).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        product = gate * up_product.to(dtype).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * F + features[None, :], product.to(dtype), mask=inside & (features < F)[None, :])


@triton.jit
def linear_add_kernel(
    x_ptr, weight_ptr, residual_ptr, total_ptr, squares_ptr, partial_ptr, arrivals_ptr,
    N, S, stride_x, stride_weight, stride_residual,
    K: tl.constexpr, D: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr, TILE_K: tl.constexpr,
    SPLITS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's sum may be cut into SPLITS of PART features: the program that arrives last adds them in their order."""
    rows = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    columns = tl.program_id(0) * TILE_D + tl.arange(0, TILE_D)
    dtype = x_ptr.dtype.element_ty
    inside = (rows < N)[:, None]
    product = tl.zeros((TILE_N, TILE_D), tl.float32)
    first = tl.program_id(2) * PART
    for start in range(0, PART, TILE_K):
        k = first + start + tl.arange(0, TILE_K)
        mask = (columns < D)[:, None] & (k < K)[None, :]
        weight = tl.load(weight_ptr + columns[:, None] * stride_weight + k[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_x + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        product = tl.dot(x, tl.trans(weight), product, input_precision=PRECISION)
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        place = tl.arange(0, TILE_N)[:, None] * TILE_D + tl.arange(0, TILE_D)[None, :]
        parts_ptr = partial_ptr + tile * (SPLITS * TILE_N * TILE_D) + place
        tl.store(parts_ptr + tl.program_id(2) * (TILE_N * TILE_D), product)
        tl.debug_barrier()  # the atomic is one thread's: its release covers what the others stored before the barrier
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        product = tl.zeros((TILE_N, TILE_D), tl.float32)
        for split in tl.static_range(SPLITS):  # past the first-level cache, which other programs' stores do not reach
            product += tl.load(parts_ptr + split * (TILE_N * TILE_D), cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)  # for the next launch
    stored = inside & (columns < D)[None, :]
    residual = tl.load(residual_ptr + rows[:, None] * stride_residual + columns[None, :], mask=stored, other=0.0)
    total = (residual.to(tl.float32) + product.to(dtype).to(tl.float32)).to(dtype)
    tl.store(total_ptr + rows[:, None] * D + columns[None, :], total, mask=stored)
    wide = total.to(tl.float32)
    tl.store(squares_ptr + rows * S + tl.program_id(0), tl.sum(wide * wide, axis=1), mask=rows < N)


def launch_norm_linear(
    x: Tensor, squares: Tensor, norm_weight: Tensor, weight: Tensor, up_weight: Tensor | None, eps: float
) -> Tensor:
    """`norm_linear` on checked inputs."""
    (N, D), F = x.shape, len(weight)
    out = x.new_empty(N, F)
    if N:
        squares, up = squares.contiguous(), weight if up_weight is None else up_weight
        options = norm_linear_options(N, D, F, squares.shape[1], up_weight is not None, x.element_size())
        grid = (triton.cdiv(F, options["TILE_F"]), triton.cdiv(N, options["TILE_N"]))
        norm_linear_kernel[grid](
            x, squares, norm_weight, weight, up, out, N, squares.shape[1],
            x.stride(0), weight.stride(0), up.stride(0), eps, **options,
        )  # fmt: skip
    return out


def launch_linear_add(x: Tensor, weight: Tensor, residual: Tensor, squares_of: int) -> tuple[Tensor, Tensor]:
    """`linear_add` on checked inputs, with squares summed over so many columns."""
    (N, K), D = x.shape, len(weight)
    total, squares = x.new_empty(N, D), x.new_empty(N, triton.cdiv(D, squares_of), dtype=torch.float32)
    if N:
        options = linear_add_options(N, K, D, squares_of, x.element_size())
        tiles, splits = (triton.cdiv(D, options["TILE_D"]), triton.cdiv(N, options["TILE_N"])), options["SPLITS"]
        count = tiles[0] * tiles[1]
        partial = squares  # not used
        if splits > 1:
            partial = squares.new_empty(count * splits * options["TILE_N"] * options["TILE_D"])
        linear_add_kernel[(*tiles, splits)](
            x, weight, residual, total, squares, partial, arrivals(x.device, count), N, squares.shape[1],
            x.stride(0), weight.stride(0), residual.stride(0), **options,
        )  # fmt: skip
    return total, squares


def norm_linear_options(N: int, D: int, F: int, S: int, gated: bool, element_size: int) -> dict:
    """Compile-time options, as the launcher and the compile tests use them."""
    blocks = block_sizes("norm_linear", D)
    sizes = {"D": D, "F": F, "TILE_S": triton.next_power_of_2(S), "GATED": gated}
    tiles = {"TILE_F": blocks["TILE_F"], "TILE_D": _tile(blocks["TILE_D"], D, N)}
    return {**sizes, **tiles, **_launch(blocks, N, element_size)}


def linear_add_options(N: int, K: int, D: int, squares_of: int, element_size: int) -> dict:
    """Compile-time options, as the launcher and the compile tests use them."""
    blocks = block_sizes("linear_add", K)
    tiles = {"TILE_D": squares_of, "TILE_K": _tile(blocks["TILE_K"], K, N)}
    splits = min(blocks["SPLITS"], triton.cdiv(K, tiles["TILE_K"]))
    part = triton.cdiv(triton.cdiv(K, tiles["TILE_K"]), splits) * tiles["TILE_K"]
    tiles |= {"SPLITS": splits, "PART": part}
    return {"K": K, "D": D, **tiles, **_launch(blocks, N, element_size)}


def _tile(tile: int, size: int, N: int) -> int:
    """Of the features that are summed: half as many for twice the rows."""
    return max(16, min(tile if N <= 16 else tile // 2, triton.next_power_of_2(size)))


def _launch(blocks: Mapping[str, int], N: int, element_size: int) -> dict:
    half = element_size == 2
    return {
        "TILE_N": 16 if N <= 16 else 32,
        "PRECISION": "tf32" if half else "ieee",  # has no effect on half-precision operands
        "num_warps": blocks["num_warps"],
        "num_stages": blocks["num_stages"] if half else 2,
        "enable_fp_fusion": True,
    }
