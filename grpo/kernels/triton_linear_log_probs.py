"""Triton kernels of `linear_token_log_probs`.

Forward, bf16 and fp16 of small width: tiles of logits live in registers only. A program walks over one split of the
vocabulary for one tile of rows and leaves the split's maximum, sum of exponentials and first moment; a second kernel
merges the splits in order and adds the logits of the tokens. Splits depend on V alone, so a row's result depends on no
other row.

Backward, and the other forward passes: chunks of rows. The library's matrix product writes fp32 logits, the row kernels
of `triton_log_probs.py` read log-probs off them and turn them in place into gradients, which two more products use. One
chunk alone is kept between the passes.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import triton_log_probs
from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.dispatch import has_ex2
from grpo.kernels.projection import LogitChunks, mixed_products, wide_product
from grpo.kernels.row_math import ScoredRows, new_outputs
from grpo.kernels.triton_log_probs import LN_2, LOG2_E, absorb_tile

_SPLIT = 2048


@triton.jit
def split_kernel(
    hidden_ptr, weight_ptr, peak_ptr, total_ptr, moment_ptr,
    N, stride_hidden, stride_weight, inverse_temperature,
    V: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
    TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr, WITH_ENTROPY: tl.constexpr, EX2: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    split = tl.program_id(1)
    features = tl.arange(0, TILE_D)
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hidden
    peak = tl.full((TILE_N,), -3.4e38, tl.float32)
    total = tl.zeros((TILE_N,), tl.float32)
    moment = tl.zeros((TILE_N,), tl.float32)
    for tile in range(0, SPLIT, TILE_V):
        columns = split * SPLIT + tile + tl.arange(0, TILE_V)
        weight_rows = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight
        logits = tl.zeros((TILE_N, TILE_V), tl.float32)
        for start in range(0, D, TILE_D):
            feature = start + features
            hidden_mask = (rows[:, None] < N) & (feature[None, :] < D)
            weight_mask = (columns[None, :] < V) & (feature[:, None] < D)
            hidden = tl.load(hidden_rows + feature[None, :], mask=hidden_mask, other=0.0)
            weight = tl.load(weight_rows + feature[:, None], mask=weight_mask, other=0.0)
            logits = tl.dot(hidden, weight, logits)
        logits = tl.where(columns[None, :] < V, logits, float("-inf"))
        peak, total, moment = absorb_tile(
            logits, inverse_temperature * LOG2_E, peak, total, moment, 1, WITH_ENTROPY, EX2
        )
    partial = split.to(tl.int64) * N + rows
    tl.store(peak_ptr + partial, peak, mask=rows < N)
    tl.store(total_ptr + partial, total, mask=rows < N)
    if WITH_ENTROPY:
        tl.store(moment_ptr + partial, moment, mask=rows < N)


@triton.jit
def merge_kernel(
    hidden_ptr, weight_ptr, tokens_ptr, peak_ptr, total_ptr, moment_ptr, log_probs_ptr, lse_ptr, entropy_ptr,
    N, stride_hidden, stride_weight, inverse_temperature,
    V: tl.constexpr, D: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr,
    TILE_SPLITS: tl.constexpr, TILE_M: tl.constexpr, TILE_D: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, TILE_SPLITS)
    partial = splits.to(tl.int64) * N + row
    peaks = tl.load(peak_ptr + partial, mask=splits < SPLITS, other=-3.4e38)
    peak = tl.max(peaks, axis=0)
    shrink = tl.exp2(peaks - peak)
    totals = tl.load(total_ptr + partial, mask=splits < SPLITS, other=0.0)
    total = tl.sum(totals * shrink, axis=0)
    log_total = tl.log(total)
    tl.store(lse_ptr + row, peak * LN_2 + log_total)
    if WITH_ENTROPY:
        moments = tl.load(moment_ptr + partial, mask=splits < SPLITS, other=0.0)
        # Not 0 * -inf where a split holds nothing but -inf.
        moved = tl.where(totals > 0, totals * (peaks - peak), 0.0)
        moment = tl.sum(shrink * (moments + moved), axis=0)
        tl.store(entropy_ptr + row, log_total - LN_2 * (moment / total))

    m = tl.arange(0, TILE_M)
    tokens = tl.load(tokens_ptr + row * M + m, mask=m < M, other=0)
    inside = (tokens >= 0) & (tokens < V)
    products = tl.zeros((TILE_M, TILE_D), tl.float32)
    for start in range(0, D, TILE_D):
        feature = start + tl.arange(0, TILE_D)
        hidden = tl.load(hidden_ptr + row * stride_hidden + feature, mask=feature < D, other=0.0).to(tl.float32)
        weight_rows = weight_ptr + tokens[:, None] * stride_weight
        chosen = tl.load(weight_rows + feature[None, :], mask=inside[:, None] & (feature[None, :] < D), other=0.0)
        products += hidden[None, :] * chosen.to(tl.float32)
    # A token out of range has no log-prob, and reads nothing.
    chosen = tl.where(inside, tl.sum(products, axis=1), float("nan"))
    relative = chosen * (inverse_temperature * LOG2_E) - peak
    tl.store(log_probs_ptr + row * M + m, relative * LN_2 - log_total, mask=m < M)


def launch_forward(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs [N, M], lse [N] and entropy [N] (or [0]) of hidden [N, D] and weight [V, D] in bf16 or fp16."""
    outputs = new_outputs(tokens, with_entropy, hidden)
    (N, D), V, M = hidden.shape, weight.shape[0], tokens.shape[1]
    if N == 0:
        return outputs
    options, splits = split_options(V, D, with_entropy), triton.cdiv(V, _SPLIT)
    partials = hidden.new_empty(3, splits, N, dtype=torch.float32)
    layout = (N, hidden.stride(0), weight.stride(0), 1 / temperature)
    split_kernel[(triton.cdiv(N, options["TILE_N"]), splits)](hidden, weight, *partials, *layout, **options)
    merge_kernel[(N,)](
        hidden, weight, tokens.contiguous(), *partials, *outputs, *layout, **merge_options(V, D, M, with_entropy)
    )
    return outputs


class TritonLogitChunks(LogitChunks):
    """The same with the row kernels. A chunk's logits are not divided by the temperature: the kernels do that."""

    widens = False

    def product(self, hidden: Tensor, scores: Tensor) -> None:
        wide_product(hidden, self.weight.t(), out=scores)

    def score(self, scores: Tensor, tokens: Tensor, log_probs: Tensor, lse: Tensor, entropy: Tensor) -> None:
        triton_log_probs.launch_forward(scores, tokens, self.temperature, log_probs, lse, entropy)

    def tempered(self, logits: Tensor) -> Tensor:
        return logits

    def backward(self, rows: slice, scores: Tensor, scored: ScoredRows) -> None:
        # The gradient takes the place of the logits, in the type of the products that follow.
        self.backward_into(scores.view(self.hidden.dtype)[:, : self.weight.shape[0]], rows, scores, scored)

    def backward_into(self, gradient: Tensor, rows: slice, scores: Tensor, scored: ScoredRows) -> None:
        """`backward` with the place of the gradient [n, V] given."""
        triton_log_probs.launch_backward(scores, scored.rows(rows), self.temperature, gradient)
        if self.needs_hidden:
            torch.mm(gradient, self.weight, out=self.grad_hidden[rows])
        if self.needs_weight and mixed_products(gradient):
            total, hidden = self.grad_weight, self.hidden[rows]
            torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
        elif self.needs_weight:
            self.grad_weight.addmm_(gradient.t().float(), self.hidden[rows].float())

    def score_kept(self, outputs: Sequence[Tensor], tokens: Tensor) -> Tensor:
        scores = wide_product(self.hidden, self.weight.t())
        self.score(scores, tokens, *outputs)  # leaves them as they are
        return scores

    def backward_kept(self, scores: Tensor, scored: ScoredRows) -> None:
        gradient = torch.empty_like(scores, dtype=self.hidden.dtype)
        self.backward_into(gradient, slice(None), scores, scored)


def split_options(V: int, D: int, with_entropy: bool) -> dict:
    """Compile-time options of `split_kernel`, as the launcher and the compile tests use them."""
    sizes = block_sizes("linear_split", D)
    tiles = {"TILE_N": sizes["TILE_N"], "TILE_V": sizes["TILE_V"]}
    tiles["TILE_D"] = min(sizes["TILE_D"], max(16, triton.next_power_of_2(D)))
    stages = 2 if torch.version.hip else sizes["num_stages"]
    launch = {"num_warps": sizes["num_warps"], "num_stages": stages, "enable_fp_fusion": True}
    return {"V": V, "D": D, "SPLIT": _SPLIT, "WITH_ENTROPY": with_entropy, "EX2": has_ex2(), **tiles, **launch}


def merge_options(V: int, D: int, M: int, with_entropy: bool) -> dict:
    """Compile-time options of `merge_kernel`, as the launcher and the compile tests use them."""
    splits, tile_m = triton.cdiv(V, _SPLIT), max(1, triton.next_power_of_2(M))
    tile_d = max(32, min(triton.next_power_of_2(D), 4096 // tile_m))
    tiles = {"TILE_SPLITS": triton.next_power_of_2(splits), "TILE_M": tile_m, "TILE_D": tile_d}
    launch = {**block_sizes("linear_merge", D), "enable_fp_fusion": True}
    return {"V": V, "D": D, "M": M, "SPLITS": splits, "WITH_ENTROPY": with_entropy, **tiles, **launch}
