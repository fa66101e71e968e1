"""Triton kernels of `token_log_probs`: one program for each row, the row read once in tiles, and once written back."""

import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.dispatch import has_ex2
from grpo.kernels.row_math import ScoredRows

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_LOG_ZERO = tl.constexpr(-1e4)  # stands in for log 0: 0 times it is 0, where 0 times -inf would be NaN


@triton.jit
def power_of_two(x, EX2: tl.constexpr):
    """2 ** x in fp32; with EX2 by the bare instruction of NVIDIA's GPUs, where results below 2 ** -126 are 0."""
    if EX2:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def absorb_tile(logits, scale, peak, total, moment, AXIS: tl.constexpr, WITH_ENTROPY: tl.constexpr, EX2: tl.constexpr):
    """One more tile along `AXIS` taken into the online softmax of a row or of several, of the scores logits * scale.

    Scores are in units of ln 2, so that a weight is a power of two. `peak` is the largest score so far, `total` the sum
    of the weights 2 ** (score - peak), `moment` that of weight * (score - peak), which the entropy needs.
    """
    new_peak = tl.maximum(peak, tl.max(logits, axis=AXIS) * scale)
    relative = logits * scale - tl.expand_dims(new_peak, AXIS)  # one operation
    weights = power_of_two(relative, EX2)
    shrink = power_of_two(peak - new_peak, EX2)
    if WITH_ENTROPY:
        moved = tl.where(total > 0, total * (peak - new_peak), 0.0)  # not 0 * -inf before the first tile
        moment = shrink * (moment + moved)
        moment += tl.sum(weights * tl.maximum(relative, _LOG_ZERO), axis=AXIS)
    total = total * shrink + tl.sum(weights, axis=AXIS)
    return new_peak, total, moment


@triton.jit
def forward_kernel(
    logits_ptr, tokens_ptr, log_probs_ptr, lse_ptr, entropy_ptr,
    stride_row, inverse_temperature,
    V: tl.constexpr, M: tl.constexpr, TILE_M: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, EX2: tl.constexpr,
):  # fmt: skip
    """With AHEAD above 1 so many tiles are on their way to shared memory while one is computed."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    columns = tl.arange(0, TILE)
    # Floored, so that a tile of -inf alone gives weights of 0 and not NaN.
    peak = tl.full((), -3.4e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    scale = inverse_temperature * LOG2_E
    for start in tl.range(0, V, TILE, num_stages=AHEAD):
        logits = tl.load(row_ptr + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        peak, total, moment = absorb_tile(logits, scale, peak, total, moment, 0, WITH_ENTROPY, EX2)
    log_total = tl.log(total)
    tl.store(lse_ptr + row, peak * LN_2 + log_total)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, log_total - LN_2 * (moment / total))
    m = tl.arange(0, TILE_M)
    tokens = tl.load(tokens_ptr + row * M + m, mask=m < M, other=0)
    # A token out of range has no log-prob, and reads nothing.
    inside = (tokens >= 0) & (tokens < V)
    chosen = tl.load(row_ptr + tokens, mask=inside, other=float("nan")).to(tl.float32)
    # Relative to the peak, so that the log-prob of a certain token is 0 and not a rounding error above it.
    tl.store(log_probs_ptr + row * M + m, (chosen * scale - peak) * LN_2 - log_total, mask=m < M)


@triton.jit
def _row_gradient(logits, scale, lse, level, slope, WITH_ENTROPY: tl.constexpr, EX2: tl.constexpr):
    """d loss / d logits but for the tokens' own terms: p (level + slope log2 p); derivatives as in `row_math.py`."""
    log2_p = logits * scale - lse
    p = power_of_two(log2_p, EX2)
    if WITH_ENTROPY:
        return p * (level + slope * tl.maximum(log2_p, _LOG_ZERO))
    return p * level


@triton.jit
def backward_kernel(
    grad_log_probs_ptr, grad_entropy_ptr, logits_ptr, tokens_ptr, lse_ptr, entropy_ptr, grad_logits_ptr,
    stride_row, stride_grad_row, inverse_temperature,
    V: tl.constexpr, M: tl.constexpr, TILE_M: tl.constexpr, TILE: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    EX2: tl.constexpr,
):  # fmt: skip
    """`grad_logits` may lie over `logits`, with elements of the same size or half of it and rows at the same addresses.

    A tile is then read whole before it is written, and what is written never reaches a tile that is still to be read.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    grad_row_ptr = grad_logits_ptr + row * stride_grad_row
    scale = inverse_temperature * LOG2_E
    lse = tl.load(lse_ptr + row) * LOG2_E
    m = tl.arange(0, TILE_M)
    tokens = tl.load(tokens_ptr + row * M + m, mask=m < M, other=-1)
    inside = (tokens >= 0) & (tokens < V)
    grads = tl.load(grad_log_probs_ptr + row * M + m, mask=m < M, other=0.0)
    grads = tl.where(inside | (m >= M), grads, float("nan"))  # a token out of range spoils its row, visibly
    level = -tl.sum(grads, axis=0)
    slope = level
    if WITH_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        level -= grad_entropy * tl.load(entropy_ptr + row)
        slope = -grad_entropy * LN_2 * inverse_temperature
    level *= inverse_temperature
    chosen = tl.load(row_ptr + tokens, mask=inside, other=0.0).to(tl.float32)

    columns = tl.arange(0, TILE)
    for start in range(0, V, TILE):
        mask = start + columns < V
        logits = tl.load(row_ptr + start + columns, mask=mask, other=float("-inf")).to(tl.float32)
        gradient = _row_gradient(logits, scale, lse, level, slope, WITH_ENTROPY, EX2)
        tl.debug_barrier()
        tl.store(grad_row_ptr + start + columns, gradient.to(grad_logits_ptr.dtype.element_ty), mask=mask)

    # The tokens' own terms afterwards: M stores, instead of M comparisons for every column. A token that occurs twice
    # is stored twice, with the same value.
    same = tokens[:, None] == tokens[None, :]
    own = tl.sum(tl.where(same, grads[None, :], 0.0), axis=1) * inverse_temperature
    own += _row_gradient(chosen, scale, lse, level, slope, WITH_ENTROPY, EX2)
    tl.debug_barrier()
    tl.store(grad_row_ptr + tokens, own.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def launch_forward(logits: Tensor, tokens: Tensor, temperature: float, *outputs: Tensor) -> None:
    """Fills `outputs`, log_probs [N, M], lse [N] and entropy [N] (or [0]), from logits [N, V]."""
    N, V = logits.shape
    if N:
        options = kernel_options("log_probs_forward", V, tokens.shape[1], outputs[2].numel() > 0)
        forward_kernel[(N,)](logits, tokens.contiguous(), *outputs, logits.stride(0), 1 / temperature, **options)


def launch_backward(logits: Tensor, scored: ScoredRows, temperature: float, grad_logits: Tensor) -> None:
    """Fills grad_logits [N, V] with the gradient with respect to logits [N, V]."""
    N, V = logits.shape
    tokens, lse, entropy, grad_log_probs, grad_entropy = scored
    if N:
        backward_kernel[(N,)](
            grad_log_probs.contiguous(), lse if grad_entropy is None else grad_entropy.contiguous(),
            logits, tokens.contiguous(), lse, entropy, grad_logits,
            logits.stride(0), grad_logits.stride(0), 1 / temperature,
            **kernel_options("log_probs_backward", V, tokens.shape[1], grad_entropy is not None),
        )  # fmt: skip


def kernel_options(op: str, V: int, M: int, with_entropy: bool) -> dict:
    """Compile-time options of a kernel, "log_probs_forward" or "log_probs_backward", as launcher and tests use them."""
    sizes = block_sizes(op, V)
    tiles = {"TILE": min(triton.next_power_of_2(V), sizes["TILE"]), "TILE_M": max(1, triton.next_power_of_2(M))}
    if op == "log_probs_forward":
        tiles["AHEAD"] = sizes["AHEAD"]
    launch = {"num_warps": sizes["num_warps"], "enable_fp_fusion": True}
    return {"V": V, "M": M, "WITH_ENTROPY": with_entropy, "EX2": has_ex2(), **tiles, **launch}
