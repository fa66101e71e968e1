"""The formulas of `clipped_ratio_loss`, and its plain-torch reference, also its CPU path.

Per token, with A the advantage, r = exp(log p - log p_old) and c = clip(r, 1 - clip_low, 1 + clip_high):

    "clip"   -min(A r, A c)                     Schulman et al., arXiv 1707.06347; clip-higher: DAPO, arXiv 2503.14476
    "cispo"  -stop_gradient(c) A log p          MiniMax-M1, arXiv 2506.13585

plus kl_coef times an estimator of KL(policy || reference), with d = log p_ref - log p (Schulman, "Approximating KL
divergence", 2020): k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1. Both log-ratios are clamped to +-20 before `exp`; beyond
that the exponential is constant and has no gradient.
"""

import math

import torch
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype

SURROGATES = ("clip", "cispo")
KL_ESTIMATORS = ("none", "k1", "k2", "k3")
LOG_RATIO_LIMIT = 20.0
METRICS = (
    "policy_loss", "kl_loss", "tokens", "ratio", "ratio_squared", "kl_old", "kl_ref",
    "clipped_low", "clipped_high", "outside",
)  # fmt: skip


def ratio_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor | None,
    clip_low: float, clip_high: float, kl: str, kl_coef: float, surrogate: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the sums of `METRICS`, and d loss / d log_probs [R, M, T]; see `clipped_ratio_loss`."""
    lowest, highest, dtype = 1 - clip_low, 1 + clip_high, accumulation_dtype(log_probs)
    log_lowest, log_highest = log_bounds(clip_low, clip_high)
    gradient = torch.empty_like(log_probs, dtype=dtype)
    counted = weights != 0
    weights = weights.to(dtype)
    # What a token left out holds must not reach the sums, not even as NaN times 0.
    log_probs, old_log_probs = (x.to(dtype).where(counted, 0) for x in (log_probs, old_log_probs))
    advantages = advantages.to(dtype)[..., None].where(counted, 0)

    log_ratio, ratio, inside = _clamped_exp(log_probs - old_log_probs)
    bounded = ratio.clamp(lowest, highest)
    below, above = log_ratio < log_lowest, log_ratio > log_highest
    if surrogate == "clip":
        clipped_low, clipped_high = below & (advantages < 0), above & (advantages > 0)
        policy = -torch.minimum(advantages * ratio, advantages * bounded)
        d_policy = -advantages * ratio * (inside & ~clipped_low & ~clipped_high)
    else:
        clipped_low, clipped_high = below, above
        policy = -bounded * advantages * log_probs
        d_policy = -bounded * advantages

    if ref is None:
        divergence = d_divergence = torch.zeros_like(ratio)
    else:
        divergence, d_divergence = _kl_estimate(ref.to(dtype).where(counted, 0) - log_probs, kl)

    policy_loss, kl_loss = (weights * policy).sum(), kl_coef * (weights * divergence).sum()
    kl_old = ratio - 1 - log_ratio
    moments = (counted, ratio * counted, ratio * ratio * counted)
    per_token = (*moments, kl_old, divergence, clipped_low, clipped_high, below | above)  # as in METRICS
    sums = torch.stack([policy_loss, kl_loss, *(x.sum(dtype=dtype) for x in per_token)])
    torch.mul(weights, d_policy + kl_coef * d_divergence, out=gradient)
    return policy_loss + kl_loss, sums, gradient


def log_bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Bounds of the log-ratio. By these tokens count as clipped: an exponential's last bit, which differs between
    libraries, then moves no count."""
    return math.log(1 - clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def _clamped_exp(exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exponent clamped, its exponential, and where the clamp changes nothing."""
    clamped = exponent.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return clamped, clamped.exp(), clamped == exponent


def _kl_estimate(difference: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    """Estimate of KL(policy || reference) from log p_ref - log p, and its derivative with respect to log p."""
    if kl == "k1":
        return -difference, torch.ones_like(difference)
    if kl == "k2":
        return difference.square() / 2, -difference
    _, exponential, inside = _clamped_exp(difference)
    return exponential - difference - 1, 1 - exponential * inside
