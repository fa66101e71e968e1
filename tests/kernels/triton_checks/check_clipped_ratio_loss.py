"""The Triton kernel of `clipped_ratio_loss` beside its reference. Run by `test_triton.py`."""

import pytest
import torch

from grpo.kernels import clipped_ratio_loss, triton_ratio_loss
from grpo.kernels.block_sizes import trying
from grpo.kernels.ratio_reference import log_bounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(shape=(3, 2, 350)):  # more than one program, the last one partly filled
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(shape, generator=generator)
    old, ref = (log_probs + 0.3 * torch.randn(shape, generator=generator) for _ in range(2))
    old[0, 0, :3] = log_probs[0, 0, :3] - torch.tensor([500.0, -500.0, 21.0])
    ref[0, 0, 3:6] = log_probs[0, 0, 3:6] - torch.tensor([500.0, -500.0, 21.0])
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3)
    old[0, 1, weights[0, 1] == 0] = torch.nan
    advantages = torch.randn(shape[:2], generator=generator)
    advantages[-1, 0] = 0
    return [tensor.to(DEVICE) for tensor in (log_probs, old, advantages, weights, ref)]


def both(log_probs, old, advantages, weights, ref, *, kl="k3", surrogate="clip"):
    """Loss, metrics and gradient by the kernel and by the reference."""
    results = []
    for impl in ("triton", "reference"):
        log_probs = log_probs.detach().requires_grad_()
        loss, metrics = clipped_ratio_loss(
            log_probs, old, advantages, weights=weights, clip_low=0.2, clip_high=0.28, kl=kl, kl_coef=0.1,
            ref_log_probs=None if kl == "none" else ref, surrogate=surrogate, impl=impl,
        )  # fmt: skip
        results.append((loss, metrics, *torch.autograd.grad(loss, log_probs)))
    return results


@pytest.mark.parametrize("kl", ["none", "k1", "k2", "k3"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def check_equals_the_reference(surrogate, kl):
    torch.testing.assert_close(*both(*batch(), kl=kl, surrogate=surrogate), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kl", ["none", "k1", "k2", "k3"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def check_a_nan_reaches_the_loss_its_metrics_and_its_own_gradient(surrogate, kl):
    """Of a token that counts. That no minimum or maximum drops it on a GPU is seen in `test_triton.py`."""
    tensors = batch()
    place = tuple(tensors[3].nonzero()[0])
    for i in (0, 1):
        log_probs, old, *rest = (tensor.clone() for tensor in tensors)
        (log_probs, old)[i][place] = torch.nan
        ours, reference = both(log_probs, old, *rest, kl=kl, surrogate=surrogate)
        for _, metrics, gradient in (ours, reference):
            assert metrics["policy_loss"].isnan()
            assert metrics["ratio"].isnan()
            assert gradient.isnan().nonzero().tolist() == [list(place)]
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5, equal_nan=True)


def check_a_token_at_the_edge_of_the_clip_range_counts_the_same_on_both_paths():
    """Ratios one step of fp32 on either side of each bound: an exponential's last bit must not decide."""
    low, high = torch.tensor(log_bounds(0.2, 0.28)).float()
    inside = torch.stack([low, high, low.nextafter(high), high.nextafter(low)])
    outside = torch.stack([low.nextafter(low * 2), high.nextafter(high * 2)])
    log_probs = torch.cat([inside, outside]).view(1, 1, -1).to(DEVICE)
    settings = {"weights": torch.ones_like(log_probs), "clip_low": 0.2, "clip_high": 0.28}
    for impl in ("triton", "reference"):
        _, metrics = clipped_ratio_loss(
            log_probs, torch.zeros_like(log_probs), torch.ones(1, 1, device=DEVICE), **settings, impl=impl
        )
        assert (metrics["outside"].item(), metrics["clipped_high"].item()) == (2, 1)


def check_any_layout():
    """As the update hands them over: log-probs [R, T, M + 1] seen as [R, M, T], weights in order."""
    log_probs, old, advantages, weights, ref = batch((2, 4, 300))
    log_probs = log_probs.transpose(1, 2)[..., :2].transpose(1, 2)
    old, ref = old.nan_to_num()[:, 1:3], ref[:, 1:3]
    weights, advantages = weights[:1, :2].expand(2, 2, 300), advantages.t().contiguous().t()[:, :2]
    ours, reference = both(log_probs, old, advantages, weights, ref)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert ours[2].stride() == reference[2].stride()


def check_more_programs_than_the_last_one_adds_at_a_time_and_counters_that_return(monkeypatch):
    monkeypatch.setattr(triton_ratio_loss, "_TILE_PROGRAMS", 16)
    arguments = batch((1, 2, 300))
    with trying("ratio_loss", {"TILE": 16, "num_warps": 4}):  # 38 programs
        (loss, metrics, _), _ = results = both(*arguments)
        (again, again_metrics, _), _ = both(*arguments)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, loss)
    assert again_metrics == metrics
    assert all(counters.eq(0).all() for counters, *_ in triton_ratio_loss._counters.values())
