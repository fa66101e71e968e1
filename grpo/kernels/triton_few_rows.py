"""Triton kernels of `norm_linear` and `linear_add`: one program for each tile of the result.

A program streams its part of the matrix once. The rows are few and come from the cache.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.dispatch import overlap_options
from grpo.kernels.triton_norm_and_gate import wait_for_previous


@triton.jit
def prefetch(matrix_ptr, stride, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr):
    """Asks for rows of a matrix from memory into the second-level cache, a line of 128 bytes at a time."""
    LINE: tl.constexpr = 1024 // matrix_ptr.dtype.element_ty.primitive_bitwidth
    rows = tl.minimum(rows, ROWS - 1)
    columns = tl.minimum(tl.arange(0, LINES) * LINE, COLUMNS - 1)
    lines = (matrix_ptr + rows[:, None] * stride + columns[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def norm_linear_kernel(
    x_ptr, squares_ptr, norm_ptr, weight_ptr, up_ptr, out_ptr, N, S, stride_x, stride_weight, stride_up, eps,
    D: tl.constexpr, F: tl.constexpr, TILE_S: tl.constexpr, TILE_N: tl.constexpr, TILE_F: tl.constexpr,
    TILE_D: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    features = tl.program_id(0) * TILE_F + tl.arange(0, TILE_F)
    if OVERLAP:
        # No kernel writes weights: their way from memory need not wait for the kernel before.
        prefetch(weight_ptr, stride_weight, features, F, D, LINES)
        if GATED:
            prefetch(up_ptr, stride_up, features, F, D, LINES)
        wait_for_previous()
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
    x_ptr, weight_ptr, residual_ptr, total_ptr, squares_ptr, N, S, stride_x, stride_weight, stride_residual,
    K: tl.constexpr, D: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr, TILE_K: tl.constexpr,
    PRECISION: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    columns = tl.program_id(0) * TILE_D + tl.arange(0, TILE_D)
    if OVERLAP:
        prefetch(weight_ptr, stride_weight, columns, D, K, LINES)
        wait_for_previous()
    dtype = x_ptr.dtype.element_ty
    inside = (rows < N)[:, None]
    product = tl.zeros((TILE_N, TILE_D), tl.float32)
    for start in range(0, K, TILE_K):
        k = start + tl.arange(0, TILE_K)
        mask = (columns < D)[:, None] & (k < K)[None, :]
        weight = tl.load(weight_ptr + columns[:, None] * stride_weight + k[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_x + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        product = tl.dot(x, tl.trans(weight), product, input_precision=PRECISION)
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
            x.stride(0), weight.stride(0), up.stride(0), eps, **options, **overlap_options(x.device),
        )  # fmt: skip
    return out


def launch_linear_add(x: Tensor, weight: Tensor, residual: Tensor, squares_of: int) -> tuple[Tensor, Tensor]:
    """`linear_add` on checked inputs, with squares summed over so many columns."""
    (N, K), D = x.shape, len(weight)
    total, squares = x.new_empty(N, D), x.new_empty(N, triton.cdiv(D, squares_of), dtype=torch.float32)
    if N:
        options = linear_add_options(N, K, D, squares_of, x.element_size())
        grid = (triton.cdiv(D, options["TILE_D"]), triton.cdiv(N, options["TILE_N"]))
        linear_add_kernel[grid](
            x, weight, residual, total, squares, N, squares.shape[1],
            x.stride(0), weight.stride(0), residual.stride(0), **options, **overlap_options(x.device),
        )  # fmt: skip
    return total, squares


def norm_linear_options(N: int, D: int, F: int, S: int, gated: bool, element_size: int) -> dict:
    """Compile-time options, as the launcher and the compile tests use them."""
    blocks = block_sizes("norm_linear", D)
    sizes = {"D": D, "F": F, "TILE_S": triton.next_power_of_2(S), "GATED": gated}
    tiles = {"TILE_F": blocks["TILE_F"], "TILE_D": _tile(blocks["TILE_D"], D, N)}
    return {**sizes, **tiles, **_launch(blocks, N, D, element_size)}


def linear_add_options(N: int, K: int, D: int, squares_of: int, element_size: int) -> dict:
    """Compile-time options, as the launcher and the compile tests use them."""
    blocks = block_sizes("linear_add", K)
    tiles = {"TILE_D": squares_of, "TILE_K": _tile(blocks["TILE_K"], K, N)}
    return {"K": K, "D": D, **tiles, **_launch(blocks, N, K, element_size)}


def _tile(tile: int, size: int, N: int) -> int:
    """Of the features that are summed: half as many for twice the rows."""
    return max(16, min(tile if N <= 16 else tile // 2, triton.next_power_of_2(size)))


def _launch(blocks: Mapping[str, int], N: int, columns: int, element_size: int) -> dict:
    half = element_size == 2
    return {
        "LINES": triton.next_power_of_2(triton.cdiv(columns * element_size, 128)),
        "TILE_N": 16 if N <= 16 else 32,
        "PRECISION": "tf32" if half else "ieee",  # has no effect on half-precision operands
        "num_warps": blocks["num_warps"],
        "num_stages": blocks["num_stages"] if half else 2,
        "enable_fp_fusion": True,
    }
