"""Triton kernel of `clipped_ratio_loss`: every token once; partial sums per program, added in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.ratio_loss import LOG_RATIO_LIMIT, METRICS

_TILE = 1024
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


@triton.jit
def _clamped_exp(exponent):
    """The exponent clamped, its exponential, and where the clamp changes nothing."""
    clamped = tl.minimum(tl.maximum(exponent, -_LIMIT), _LIMIT)
    return clamped, tl.exp(clamped), clamped == exponent


@triton.jit
def _kl_estimate(difference, KL: tl.constexpr):
    """Estimate of KL(policy || reference) from log p_ref - log p, and its derivative with respect to log p."""
    if KL == "k1":
        return -difference, difference * 0 + 1
    elif KL == "k2":
        return difference * difference / 2, -difference
    else:
        _, exponential, inside = _clamped_exp(difference)
        return exponential - difference - 1, 1 - tl.where(inside, exponential, 0.0)


@triton.jit
def _add(partial_ptr, index: tl.constexpr, values):
    """Stores this program's sum of `values` in row `index` of the partial sums [METRICS, programs]."""
    tl.store(partial_ptr + index * tl.num_programs(0) + tl.program_id(0), tl.sum(values, axis=0))


@triton.jit
def ratio_loss_kernel(
    log_probs_ptr,
    old_log_probs_ptr,
    advantages_ptr,
    weights_ptr,
    ref_log_probs_ptr,
    gradient_ptr,
    partial_ptr,
    count,
    T,
    lowest,
    highest,
    kl_coef,
    KL: tl.constexpr,
    HAS_REF: tl.constexpr,
    CLIP: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    weight = tl.load(weights_ptr + token, mask=token < count, other=0.0)
    counted = weight != 0
    log_p = tl.load(log_probs_ptr + token, mask=counted, other=0.0)
    old_log_p = tl.load(old_log_probs_ptr + token, mask=counted, other=0.0)
    advantage = tl.load(advantages_ptr + token // T, mask=counted, other=0.0)

    log_ratio, ratio, inside = _clamped_exp(log_p - old_log_p)
    bounded = tl.minimum(tl.maximum(ratio, lowest), highest)
    below = ratio < lowest
    above = ratio > highest
    if CLIP:
        clipped_low = below & (advantage < 0)
        clipped_high = above & (advantage > 0)
        policy = -tl.minimum(advantage * ratio, advantage * bounded)
        gradient = tl.where(inside & (clipped_low == 0) & (clipped_high == 0), -advantage * ratio, 0.0)
    else:
        clipped_low = below
        clipped_high = above
        policy = -bounded * advantage * log_p
        gradient = -bounded * advantage

    divergence = ratio * 0
    if HAS_REF:
        ref_log_p = tl.load(ref_log_probs_ptr + token, mask=counted, other=0.0)
        divergence, d_divergence = _kl_estimate(ref_log_p - log_p, KL)
        gradient += kl_coef * d_divergence
    tl.store(gradient_ptr + token, weight * gradient, mask=token < count)

    # The order is that of METRICS. Entries that are not counted have ratio 1 and weight 0.
    one = tl.where(counted, 1.0, 0.0)
    _add(partial_ptr, 0, weight * policy)
    _add(partial_ptr, 1, kl_coef * (weight * divergence))
    _add(partial_ptr, 2, one)
    _add(partial_ptr, 3, ratio * one)
    _add(partial_ptr, 4, ratio * ratio * one)
    _add(partial_ptr, 5, ratio - 1 - log_ratio)
    _add(partial_ptr, 6, divergence * one)
    _add(partial_ptr, 7, tl.where(clipped_low & counted, 1.0, 0.0))
    _add(partial_ptr, 8, tl.where(clipped_high & counted, 1.0, 0.0))
    _add(partial_ptr, 9, tl.where((below | above) & counted, 1.0, 0.0))


def launch(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_log_probs: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl: str,
    kl_coef: float,
    surrogate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the sums of `METRICS`, and d loss / d log_probs [R, M, T]."""
    log_probs = log_probs.contiguous()
    programs = triton.cdiv(log_probs.numel(), _TILE)
    gradient = torch.empty_like(log_probs)
    partial = log_probs.new_empty(len(METRICS), programs)
    if programs:
        ratio_loss_kernel[(programs,)](
            log_probs,
            old_log_probs.contiguous(),
            advantages.contiguous(),
            weights.contiguous(),
            log_probs if ref_log_probs is None else ref_log_probs.contiguous(),
            gradient,
            partial,
            log_probs.numel(),
            log_probs.shape[2],
            1 - clip_low,
            1 + clip_high,
            kl_coef,
            **kernel_options(kl, ref_log_probs is not None, surrogate),
        )
    sums = partial.sum(1)
    return sums[0] + sums[1], sums, gradient


def kernel_options(kl: str, has_ref: bool, surrogate: str) -> dict:
    """Compile-time options of the kernel, as the launcher and the compile tests use them."""
    constants = {"KL": kl, "HAS_REF": has_ref, "CLIP": surrogate == "clip", "TILE": _TILE}
    return {**constants, "num_warps": 4, "enable_fp_fusion": False}
