"""Triton kernels of `token_log_probs`: one program for each row, the row read once in tiles, and once written back."""

import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.row_math import ScoredRows


@triton.jit
def absorb_tile(scores, peak, total, moment, AXIS: tl.constexpr, WITH_ENTROPY: tl.constexpr):
    """One more tile of scores along `AXIS` taken into the online softmax of a row or of several.

    `peak` is the largest score so far, `total` the sum of the weights exp(score - peak), `moment` that of weight *
    (score - peak), which the entropy needs.
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=AXIS))
    relative = scores - tl.expand_dims(new_peak, AXIS)
    weights = tl.exp(relative)
    shrink = tl.exp(peak - new_peak)
    if WITH_ENTROPY:
        moved = tl.where(total > 0, total * (peak - new_peak), 0.0)  # not 0 * -inf before the first tile
        moment = shrink * (moment + moved)
        moment += tl.sum(tl.where(weights > 0, weights * relative, 0.0), axis=AXIS)
    total = total * shrink + tl.sum(weights, axis=AXIS)
    return new_peak, total, moment


@triton.jit
def forward_kernel(
    logits_ptr, tokens_ptr, log_probs_ptr, lse_ptr, entropy_ptr,
    stride_row, inverse_temperature,
    V: tl.constexpr, M: tl.constexpr, TILE_M: tl.constexpr, TILE: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    columns = tl.arange(0, TILE)
    # Floored, so that a tile of -inf alone gives weights of 0 and not NaN.
    peak = tl.full((), -3.4e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    for start in range(0, V, TILE):
        logits = tl.load(row_ptr + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        peak, total, moment = absorb_tile(logits * inverse_temperature, peak, total, moment, 0, WITH_ENTROPY)
    lse = peak + tl.log(total)
    tl.store(lse_ptr + row, lse)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, tl.log(total) - moment / total)
    m = tl.arange(0, TILE_M)
    tokens = tl.load(tokens_ptr + row * M + m, mask=m < M, other=0)
    # A token out of range has no log-prob, and reads nothing.
    inside = (tokens >= 0) & (tokens < V)
    chosen = tl.load(row_ptr + tokens, mask=inside, other=float("nan")).to(tl.float32) * inverse_temperature
    tl.store(log_probs_ptr + row * M + m, chosen - lse, mask=m < M)


@triton.jit
def _row_gradient(logits, lse, entropy, grad_sum, grad_entropy, inverse_temperature, WITH_ENTROPY: tl.constexpr):
    """d loss / d logits but for the tokens' own terms; derivatives as in `row_math.py`."""
    log_p = logits * inverse_temperature - lse
    p = tl.exp(log_p)
    slope = grad_sum
    if WITH_ENTROPY:
        slope += tl.where(p > 0, grad_entropy * (log_p + entropy), 0.0)
    return -(p * slope) * inverse_temperature


@triton.jit
def backward_kernel(
    grad_log_probs_ptr, grad_entropy_ptr, logits_ptr, tokens_ptr, lse_ptr, entropy_ptr, grad_logits_ptr,
    stride_row, stride_grad_row, inverse_temperature,
    V: tl.constexpr, M: tl.constexpr, TILE_M: tl.constexpr, TILE: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """`grad_logits` may lie over `logits`, with elements of the same size or half of it and rows at the same addresses.

    A tile is then read whole before it is written, and what is written never reaches a tile that is still to be read.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    grad_row_ptr = grad_logits_ptr + row * stride_grad_row
    lse = tl.load(lse_ptr + row)
    entropy, grad_entropy = lse, lse
    if WITH_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        grad_entropy = tl.load(grad_entropy_ptr + row)
    m = tl.arange(0, TILE_M)
    tokens = tl.load(tokens_ptr + row * M + m, mask=m < M, other=-1)
    inside = (tokens >= 0) & (tokens < V)
    grads = tl.load(grad_log_probs_ptr + row * M + m, mask=m < M, other=0.0)
    grads = tl.where(inside | (m >= M), grads, float("nan"))  # a token out of range spoils its row, visibly
    grad_sum = tl.sum(grads, axis=0)
    chosen = tl.load(row_ptr + tokens, mask=inside, other=0.0).to(tl.float32)

    columns = tl.arange(0, TILE)
    for start in range(0, V, TILE):
        mask = start + columns < V
        logits = tl.load(row_ptr + start + columns, mask=mask, other=float("-inf")).to(tl.float32)
        gradient = _row_gradient(logits, lse, entropy, grad_sum, grad_entropy, inverse_temperature, WITH_ENTROPY)
        tl.debug_barrier()
        tl.store(grad_row_ptr + start + columns, gradient.to(grad_logits_ptr.dtype.element_ty), mask=mask)

    # The tokens' own terms afterwards: M stores, instead of M comparisons for every column. A token that occurs twice
    # is stored twice, with the same value.
    same = tokens[:, None] == tokens[None, :]
    own = tl.sum(tl.where(same, grads[None, :], 0.0), axis=1) * inverse_temperature
    own += _row_gradient(chosen, lse, entropy, grad_sum, grad_entropy, inverse_temperature, WITH_ENTROPY)
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
    launch = {"num_warps": sizes["num_warps"], "enable_fp_fusion": True}
    return {"V": V, "M": M, "WITH_ENTROPY": with_entropy, **tiles, **launch}
