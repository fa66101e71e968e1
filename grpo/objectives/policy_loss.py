"""The policy loss in all its variants, on top of one clipped-ratio operation."""

import torch
from torch import Tensor

from grpo.kernels import clipped_ratio_loss

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")


def token_weights(
    shape: tuple[int, int, int],
    *,
    loss: str,
    sequences: float,
    keep: Tensor | None = None,
    keep_probability: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Weight of every token in the loss, so that the loss is a plain sum over tokens, micro-batches and ranks.

    `grpo`, `gspo`: mean over the kept tokens of a sequence, then over sequences. `dapo`, `cispo`: mean over all tokens
    kept in expectation (the realised count would differ between ranks and micro-batches). `dr_grpo`: sum over tokens
    divided by the constant length.

    Args:
        shape: (R, M, T).
        loss: one of LOSSES.
        sequences: completions of the whole optimizer step, over all ranks and micro-batches.
        keep: [R, M, T] bool, the tokens not dropped from the loss; None keeps all.
        keep_probability: the probability with which `keep` was drawn.

    Returns:
        [R, M, T] fp32; 0 for dropped tokens.
    """
    length = shape[-1]
    if keep is None:
        return torch.full(shape, 1.0 / (length * sequences), device=device)
    kept = keep.float()
    if loss in ("grpo", "gspo"):
        return kept / (kept.sum(dim=-1, keepdim=True).clamp_min(1.0) * sequences)
    expected_length = length if loss == "dr_grpo" else length * keep_probability
    return kept / (expected_length * sequences)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    loss: str = "grpo",
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
        log_probs: [R, M, T] fp32 with gradient.
        old_log_probs: [R, M, T] under the policy that sampled.
        advantages: [R, M].
        loss: one of LOSSES.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        weights: [R, M, T] from `token_weights`; None is the mean over this input.
        ref_log_probs: [R, M, T] under the frozen reference, required unless kl is "none".
        kl, kl_coef: estimator k1, k2 or k3 (Schulman, "Approximating KL divergence") and its weight.
        impl: backend of the operation.

    Returns:
        (loss [], metrics): the sums of `clipped_ratio_loss` and their counts, "tokens" and, for the ratio of gspo,
            "sequences".

    Raises:
        ValueError: unknown loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown policy loss {loss!r}; one of {', '.join(LOSSES)}")
    if weights is None:
        weights = token_weights(
            tuple(log_probs.shape),
            loss=loss,
            sequences=log_probs.shape[0] * log_probs.shape[1],
            device=log_probs.device,
        )
    penalty = {"ref_log_probs": ref_log_probs, "kl": kl, "kl_coef": kl_coef}
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    if loss != "gspo":
        surrogate = "cispo" if loss == "cispo" else "clip"
        return clipped_ratio_loss(
            log_probs, old_log_probs, advantages, weights=weights, surrogate=surrogate, impl=impl, **clip, **penalty
        )
    sequence_weights = weights.sum(dim=-1, keepdim=True)  # [R, M, 1]
    share = weights / sequence_weights
    value, metrics = clipped_ratio_loss(
        (share * log_probs).sum(dim=-1, keepdim=True),
        (share * old_log_probs).sum(dim=-1, keepdim=True),
        advantages,
        weights=sequence_weights,
        impl=impl,
        **clip,
    )
    if kl != "none":
        kl_value, kl_metrics = clipped_ratio_loss(
            log_probs, old_log_probs, torch.zeros_like(advantages), weights=weights, impl=impl, **clip, **penalty
        )
        value = value + kl_value
        metrics |= {name: kl_metrics[name] for name in ("kl_loss", "kl_ref")}
    metrics |= {"sequences": metrics["tokens"], "tokens": (weights != 0).sum()}
    return value, metrics
