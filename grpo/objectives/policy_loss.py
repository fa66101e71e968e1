"""The policy loss in all its variants, on top of one clipped-ratio operation."""

from functools import partial
from typing import get_args

import torch
from torch import Tensor

from grpo.config.types import PolicyLoss
from grpo.kernels import clipped_ratio_loss


def token_weights(
    shape: tuple[int, int, int],
    *,
    loss: PolicyLoss,
    sequences: float,
    keep: Tensor | None = None,
    keep_probability: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Weight of every token, [R, M, T] fp32: the loss is a plain sum over tokens, micro-batches and ranks.

    `grpo`, `gspo`: mean over the kept tokens of a sequence, then over sequences. `dapo`, `cispo`: mean over all tokens
    kept in expectation (the realised count would differ between ranks and micro-batches). `dr_grpo`: sum over tokens
    divided by the constant length. A dropped token has weight 0.

    Args:
        sequences: completions of the whole optimizer step, over all ranks and micro-batches.
        keep: [R, M, T] bool, the tokens not dropped from the loss; None keeps all.
        keep_probability: the probability with which `keep` was drawn.
    """
    length = shape[-1]
    if keep is None:
        return torch.full(shape, 1.0 / (length * sequences), device=device)
    if loss in ("grpo", "gspo"):
        length = keep.float().sum(dim=-1, keepdim=True).clamp_min(1.0)
    elif loss != "dr_grpo":
        length = length * keep_probability
    return keep.float() / (length * sequences)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    loss: PolicyLoss = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weights: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl: str = "none",
    kl_coef: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped-ratio policy loss plus an optional KL penalty.

    Per token max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)) with ratio = exp(log_probs - old_log_probs)
    (PPO, arXiv 1707.06347), weighted and summed. `gspo` (arXiv 2507.18071) takes the ratio of the geometric mean over
    a sequence; `cispo` (arXiv 2506.13585) uses the clipped ratio as a detached weight of A log_probs.

    Args:
        log_probs, old_log_probs: [R, M, T] fp32, with gradient, and under the policy that sampled.
        advantages: [R, M].
        weights: [R, M, T] from `token_weights`; None is the mean over this input.
        ref_log_probs: [R, M, T] under the frozen reference, required unless kl is "none".
        kl, kl_coef: estimator k1, k2 or k3 (Schulman, "Approximating KL divergence") and its weight.

    Returns:
        (loss [], metrics): the sums of `clipped_ratio_loss` and their counts, "tokens" and, for the ratio of gspo,
            "sequences". A ValueError if the loss is unknown.
    """
    if loss not in (known := get_args(PolicyLoss)):
        raise ValueError(f"unknown policy loss {loss!r}; one of {', '.join(known)}")
    if weights is None:
        weights = torch.full_like(log_probs, 1.0 / log_probs.numel())
    ratio_loss = partial(clipped_ratio_loss, clip_low=clip_low, clip_high=clip_high, impl=impl)
    penalty = {"ref_log_probs": ref_log_probs, "kl": kl, "kl_coef": kl_coef}
    if loss != "gspo":
        surrogate = "cispo" if loss == "cispo" else "clip"
        return ratio_loss(log_probs, old_log_probs, advantages, weights=weights, surrogate=surrogate, **penalty)
    sequence_weights = weights.sum(dim=-1, keepdim=True)  # [R, M, 1]
    share = weights / sequence_weights
    means = [(share * values).sum(dim=-1, keepdim=True) for values in (log_probs, old_log_probs)]  # each [R, M, 1]
    value, metrics = ratio_loss(*means, advantages, weights=sequence_weights)
    metrics |= {"sequences": metrics["tokens"], "tokens": (weights != 0).sum()}
    if kl != "none":
        no_advantage = torch.zeros_like(advantages)
        kl_value, kl_metrics = ratio_loss(log_probs, old_log_probs, no_advantage, weights=weights, **penalty)
        value = value + kl_value
        metrics |= {name: kl_metrics[name] for name in ("kl_loss", "kl_ref")}
    return value, metrics
