"""The clipped-ratio loss with its metrics and gradient, against the same formulas in separate torch operations.

python benchmarks/bench_loss.py [--json results.json]
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.kernels import clipped_ratio_loss
from harness import DEVICE, Case, Target, compiled, launches, main

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


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Loss, metrics and gradient of R x M sequences of T tokens."""
    log_probs = -8 + torch.randn(R, M, T, device=DEVICE)
    old, ref = (log_probs + 0.2 * torch.randn_like(log_probs) for _ in range(2))
    rest = (old, torch.randn(R, M, device=DEVICE), torch.full_like(old, 1 / old.numel()), ref)
    log_probs.requires_grad_()

    def run(loss_of):
        loss, metrics = loss_of(log_probs, *rest)
        return loss, metrics, torch.autograd.grad(loss, log_probs)[0]

    def errors():
        (loss, metrics, gradient), (expected_loss, expected_metrics, expected_gradient) = run(ours), run(eager)
        launched = {LAUNCHES: launches(lambda: ours(log_probs, *rest))} if DEVICE.type == "cuda" else {}
        return launched | {
            "loss": (loss - expected_loss).abs().item(),
            "gradient": (gradient - expected_gradient).abs().max().item(),
            "metrics, relative": max((metrics[k] / v - 1).abs().item() for k, v in expected_metrics.items()),
        }

    losses = {"eager": eager, "ours": ours, **compiled(eager, options)}
    sides = {side: (lambda loss_of=loss_of: run(loss_of)) for side, loss_of in losses.items()}
    sizes = {"R": R, "M": M, "T": T}
    yield Case(BOTH, sizes, sides, errors, bytes=5 * 4 * log_probs.numel())


LAUNCHES, BOTH = "launches of our forward", "forward + backward"
TARGETS = (  # of 65536 tokens
    Target("launches of loss, metrics and gradient", lambda r: r[BOTH].error[LAUNCHES], 1, at_most=True, expected="1"),
    Target("loss and gradient, speed of eager", lambda r: r[BOTH].ratio("eager"), 8),
)


if __name__ == "__main__":
    main(__doc__, cases, TARGETS)
