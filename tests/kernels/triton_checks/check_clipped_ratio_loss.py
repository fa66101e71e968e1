"""The Triton kernel of `clipped_ratio_loss` beside its reference. Run by `test_triton.py`."""

import pytest
import torch

from grpo.kernels import clipped_ratio_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch():
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, 700)  # more than one program, the last one partly filled
    log_probs = torch.randn(shape, generator=generator)
    old, ref = (log_probs + 0.3 * torch.randn(shape, generator=generator) for _ in range(2))
    old[0, 0, :3] = log_probs[0, 0, :3] - torch.tensor([500.0, -500.0, 21.0])
    ref[0, 0, 3:6] = log_probs[0, 0, 3:6] - torch.tensor([500.0, -500.0, 21.0])
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3)
    old[0, 1, weights[0, 1] == 0] = torch.nan
    advantages = torch.randn(3, 2, generator=generator)
    advantages[2, 0] = 0
    return [tensor.to(DEVICE) for tensor in (log_probs, old, advantages, weights, ref)]


@pytest.mark.parametrize("kl", ["none", "k1", "k2", "k3"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def check_equals_the_reference(surrogate, kl):
    log_probs, old, advantages, weights, ref = batch()
    results = []
    for impl in ("triton", "reference"):
        log_probs = log_probs.detach().requires_grad_()
        loss, metrics = clipped_ratio_loss(
            log_probs, old, advantages, weights=weights, clip_low=0.2, clip_high=0.28, kl=kl, kl_coef=0.1,
            ref_log_probs=None if kl == "none" else ref, surrogate=surrogate, impl=impl,
        )  # fmt: skip
        results.append((loss, metrics, *torch.autograd.grad(loss, log_probs)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
