"""The clipped-ratio loss with its metrics and gradient, against the same formulas in separate torch operations.

python benchmarks/bench_loss.py [--json results.json]
"""

import argparse

import torch
from torch import Tensor

from grpo.kernels import clipped_ratio_loss
from harness import DEVICE, Case, Result, Target, compiled, launches, main

R, M, T = (16, 8, 512) if DEVICE.type == "cuda" else (64, 8, 576)
CLIP_LOW, CLIP_HIGH, KL_COEF = 0.2, 0.28, 0.1


def eager(log_probs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor) -> tuple[Tensor, dict]:
    """Loss and metrics by autograd's operations."""
    A = advantages[..., None]
    ratio = (log_probs - old).clamp(-20, 20).exp()
    policy = -torch.minimum(A * ratio, A * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    gap = ref - log_probs
    divergence = gap.clamp(-20, 20).exp() - gap - 1
    with torch.no_grad():
        metrics = {
            "ratio": ratio.sum(),
            "ratio_squared": ratio.square().sum(),
            "kl_old": (ratio - 1 - (log_probs - old)).sum(),
            "kl_ref": divergence.sum(),
            "clipped_low": ((ratio < 1 - CLIP_LOW) & (A < 0)).sum(),
            "clipped_high": ((ratio > 1 + CLIP_HIGH) & (A > 0)).sum(),
        }
    return (weights * (policy + KL_COEF * divergence)).sum(), metrics


def ours(log_probs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor) -> tuple[Tensor, dict]:
    """The op."""
    clip = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}
    return clipped_ratio_loss(
        log_probs, old, advantages, weights=weights, ref_log_probs=ref, kl="k3", kl_coef=KL_COEF, **clip
    )


def cases(options: argparse.Namespace) -> list[Case]:
    """Loss, metrics and gradient of R x M sequences of T tokens."""
    log_probs = -8 + torch.randn(R, M, T, device=DEVICE)
    old, ref = (log_probs + 0.2 * torch.randn_like(log_probs) for _ in range(2))
    rest = (old, torch.randn(R, M, device=DEVICE), torch.full_like(old, 1 / old.numel()), ref)
    log_probs.requires_grad_()

    def run(loss_of):
        loss, metrics = loss_of(log_probs, *rest)
        return loss, metrics, torch.autograd.grad(loss, log_probs)[0]

    (loss, metrics, gradient), (expected_loss, expected_metrics, expected_gradient) = run(ours), run(eager)
    error = {
        "loss": (loss - expected_loss).abs().item(),
        "gradient": (gradient - expected_gradient).abs().max().item(),
        "metrics, relative": max((metrics[k] / v - 1).abs().item() for k, v in expected_metrics.items()),
    }
    losses = {"eager": eager, "ours": ours, **compiled(eager, options)}
    sides = {side: (lambda loss_of=loss_of: run(loss_of)) for side, loss_of in losses.items()}
    sizes = {"R": R, "M": M, "T": T}
    size = {"bytes": 5 * 4 * log_probs.numel()}
    result = [Case("forward + backward", sizes, sides, error, **size)]
    if DEVICE.type == "cuda":
        sizes = sizes | {
            "launches": launches(lambda: ours(log_probs, *rest)),
            "launches_eager": launches(lambda: eager(log_probs, *rest)),
        }
        sides = {side: (lambda loss_of=loss_of: loss_of(log_probs, *rest)) for side, loss_of in losses.items()}
        result.append(Case("forward", sizes, sides, error, **size))
    return result


def targets(results: dict[str, Result]) -> list[Target]:
    """Wanted: 65536 tokens."""
    forward, both = results["forward"], results["forward + backward"]
    return [
        Target("launches of loss, metrics and gradient", forward.sizes["launches"], 1, at_most=True),
        Target("loss and gradient, speed of eager", both.ratio("eager"), 8),
    ]


if __name__ == "__main__":
    main(__doc__, cases, targets)
