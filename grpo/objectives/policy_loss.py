"""The policy loss in all its variants, on top of one clipped-ratio operation."""

from typing import Any, get_args

import torch
from torch import Tensor

from grpo.config.types import LossLevel, PolicyLoss
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
    length: Tensor | float = shape[-1]
    if keep is None:
        return torch.full(shape, 1.0 / (shape[-1] * sequences), device=device)
    if loss in ("grpo", "gspo"):
        length = keep.float().sum(dim=-1, keepdim=True).clamp_min(1.0)
    elif loss != "dr_grpo":
        length = length * keep_probability
    return keep.float() / (length * sequences)


def highest_entropy(entropy: Tensor, count: int) -> Tensor:
    """Which `count` positions of each context have the highest entropy, [R, T] bool, from the policy's entropy [R, T].

    After "Beyond the 80/20 Rule" (arXiv 2506.01939), which takes a share of the whole batch. By context the choice
    depends on nothing else in the batch: not on micro-batches, ranks or accumulation.
    """
    chosen = entropy.detach().topk(count, dim=-1).indices
    return torch.zeros_like(entropy, dtype=torch.bool).scatter_(-1, chosen, True)


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
    kl_level: LossLevel = "token",
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped-ratio policy loss plus an optional KL penalty.

    Per token max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)) with ratio = exp(log_probs - old_log_probs)
    (PPO, arXiv 1707.06347), weighted and summed. `gspo` (arXiv 2507.18071) takes the ratio of the geometric mean over
    a sequence; `cispo` (arXiv 2506.13585) uses the clipped ratio as a detached weight of A log_probs.

    The penalty is kl_coef times the estimator k(d), with d = ref_log_probs - log_probs of each token, or, at the level
    of sequences, with the length-normalised d = mean over the sequence of (ref_log_probs - log_probs), like gspo's
    ratio. Means over a sequence are weighted as the loss weights its tokens.

    Args:
        log_probs, old_log_probs: [R, M, T] fp32, with gradient, and under the policy that sampled.
        advantages: [R, M].
        weights: [R, M, T] from `token_weights`; None is the mean over this input.
        ref_log_probs: [R, M, T] under the frozen reference, required unless kl is "none".
        kl, kl_coef: estimator k1, k2 or k3 (Schulman, "Approximating KL divergence") and its weight.
        kl_level: what the estimator is applied to, "token" or "sequence".

    Returns:
        (loss [], metrics): the sums of `clipped_ratio_loss` and their counts, "tokens" and "sequences": the ratio of
            gspo, and a KL of sequences, are sums over sequences. A ValueError if the loss or a level is unknown.
    """
    if loss not in (known := get_args(PolicyLoss)):
        raise ValueError(f"unknown policy loss {loss!r}; one of {', '.join(known)}")
    if kl_level not in get_args(LossLevel):
        raise ValueError(f"unknown level {kl_level!r} of the KL; one of {', '.join(get_args(LossLevel))}")
    if weights is None:
        weights = torch.full_like(log_probs, 1.0 / log_probs.numel())
    levels = {"token": (log_probs, old_log_probs, weights, ref_log_probs)}
    level = "sequence" if loss == "gspo" else "token"
    if "sequence" in (level, kl_level):
        levels["sequence"] = _by_sequence(*levels["token"])

    def terms(level: str, advantages: Tensor, *, with_kl: bool) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, old_log_probs, weights, ref_log_probs = levels[level]
        penalty: dict[str, Any] = {"ref_log_probs": ref_log_probs, "kl": kl, "kl_coef": kl_coef} if with_kl else {}
        return clipped_ratio_loss(
            log_probs,
            old_log_probs,
            advantages,
            weights=weights,
            surrogate="cispo" if loss == "cispo" else "clip",
            clip_low=clip_low,
            clip_high=clip_high,
            impl=impl,
            **penalty,
        )

    value, metrics = terms(level, advantages, with_kl=kl_level == level)
    if kl_level != level and ref_log_probs is not None:
        penalty, kl_metrics = terms(kl_level, torch.zeros_like(advantages), with_kl=True)
        value = value + penalty
        metrics |= {name: kl_metrics[name] for name in ("kl_loss", "kl_ref")}
    if "sequence" in levels:
        metrics |= {f"{name}s": (parts[2] != 0).sum() for name, parts in levels.items()}
    return value, metrics


def _by_sequence(
    log_probs: Tensor, old_log_probs: Tensor, weights: Tensor, ref_log_probs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same of whole sequences, [R, M, 1]: means of log-probs weighted like the loss, and sums of the weights."""
    whole = weights.sum(dim=-1, keepdim=True)
    share = weights / whole.clamp_min(torch.finfo(whole.dtype).tiny)  # a sequence of weight 0 is left out

    def mean(values: Tensor) -> Tensor:
        return (share * values).sum(dim=-1, keepdim=True)

    return mean(log_probs), mean(old_log_probs), whole, None if ref_log_probs is None else mean(ref_log_probs)
