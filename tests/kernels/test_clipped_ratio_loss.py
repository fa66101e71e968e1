"""The torch reference of `clipped_ratio_loss`: cases worked by hand, gradients against autograd, refusals."""

import math

import pytest
import torch
from torch.library import opcheck

from grpo.kernels import clipped_ratio_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def one_token(ratio, advantage, *, log_prob=-1.0, ref_gap=None, **options):
    """Loss, metrics and gradient of a single token of weight 1."""
    log_probs = torch.full((1, 1, 1), log_prob, dtype=torch.double, requires_grad=True)
    ref = None if ref_gap is None else log_probs.detach() + ref_gap
    loss, metrics = clipped_ratio_loss(
        log_probs,
        log_probs.detach() - math.log(ratio),
        torch.full((1, 1), advantage, dtype=torch.double),
        weights=torch.ones(1, 1, 1),
        ref_log_probs=ref,
        **{**CLIP, **options},
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.item(), gradient.item(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.25, 2.0, -2.5, -2.5, None),
        (1.5, 2.0, -2.6, 0.0, "clipped_high"),
        (1.5, -2.0, 3.0, 3.0, None),
        (0.5, 2.0, -1.0, -1.0, None),
        (0.5, -2.0, 1.6, 0.0, "clipped_low"),
        (1.5, 0.0, 0.0, 0.0, None),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    actual_loss, actual_gradient, metrics = one_token(ratio, advantage)
    assert actual_loss == pytest.approx(loss)
    assert actual_gradient == pytest.approx(gradient)
    assert metrics["clipped_low"] == (clipped == "clipped_low")
    assert metrics["clipped_high"] == (clipped == "clipped_high")
    assert metrics["outside"] == (not 0.8 <= ratio <= 1.3)
    assert metrics["policy_loss"] == actual_loss
    assert metrics["tokens"] == 1
    assert metrics["ratio"] == pytest.approx(ratio)
    assert metrics["ratio_squared"] == pytest.approx(ratio**2)
    assert metrics["kl_old"] == pytest.approx(ratio - 1 - math.log(ratio))


@pytest.mark.parametrize(("ratio", "bounded"), [(0.5, 0.8), (1.1, 1.1), (2.0, 1.3)])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_cispo_by_hand(ratio, bounded, advantage):
    loss, gradient, metrics = one_token(ratio, advantage, log_prob=-3.0, surrogate="cispo")
    assert loss == pytest.approx(bounded * advantage * 3)
    assert gradient == pytest.approx(-bounded * advantage)
    assert metrics["clipped_low"] + metrics["clipped_high"] == (ratio != bounded)


@pytest.mark.parametrize(
    ("kl", "value", "slope"),
    [("k1", -0.4, 1.0), ("k2", 0.08, -0.4), ("k3", math.exp(0.4) - 1.4, 1 - math.exp(0.4))],
)
def test_kl_by_hand(kl, value, slope):
    loss, gradient, metrics = one_token(1.0, 0.0, ref_gap=0.4, kl=kl, kl_coef=0.5)
    assert loss == pytest.approx(0.5 * value)
    assert gradient == pytest.approx(0.5 * slope)
    assert metrics["kl_ref"] == pytest.approx(value)
    assert metrics["kl_loss"] == pytest.approx(0.5 * value)


def test_a_reference_without_a_kl_term_is_measured_only():
    loss, gradient, metrics = one_token(1.0, 0.0, ref_gap=0.4, kl="none", kl_coef=0.5)
    assert loss == gradient == metrics["kl_loss"] == 0
    assert metrics["kl_ref"] == pytest.approx(math.exp(0.4) - 1.4)


def test_enormous_ratios_stay_finite():
    for exponent in (500.0, -500.0):
        for surrogate in ("clip", "cispo"):
            log_probs = torch.full((1, 1, 1), -1.0, requires_grad=True)
            far = log_probs.detach() - exponent
            loss, metrics = clipped_ratio_loss(
                log_probs, far, torch.tensor([[-1.0]]), weights=torch.ones(1, 1, 1), ref_log_probs=-far, kl="k3",
                kl_coef=1.0, surrogate=surrogate, **CLIP,
            )  # fmt: skip
            loss.backward()
            assert loss.isfinite()
            assert log_probs.grad.isfinite().all()
            assert all(value.isfinite() for value in metrics.values())


def batch(dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 5)
    log_probs = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    old, ref = (log_probs.detach() + 0.3 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3)
    return log_probs, old, torch.randn(3, 4, generator=generator, dtype=dtype), weights.to(dtype), ref


@pytest.mark.parametrize("kl", ["none", "k1", "k2", "k3"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_gradient_equals_that_of_autograd(surrogate, kl):
    log_probs, old, advantages, weights, ref = batch()
    loss, metrics = clipped_ratio_loss(
        log_probs, old, advantages, weights=weights, ref_log_probs=ref, kl=kl, kl_coef=0.7, surrogate=surrogate, **CLIP
    )
    ratio, gap, A = (log_probs - old).exp(), ref - log_probs, advantages[..., None]
    bounded = ratio.clamp(0.8, 1.3)
    policy = -torch.minimum(A * ratio, A * bounded) if surrogate == "clip" else -bounded.detach() * A * log_probs
    estimates = {"none": 0 * gap, "k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - gap - 1}
    expected = (weights * (policy + 0.7 * estimates[kl])).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, log_probs), torch.autograd.grad(expected, log_probs))
    counted = weights != 0
    assert metrics["tokens"] == counted.sum()
    torch.testing.assert_close(metrics["ratio"], ratio[counted].sum().detach())
    torch.testing.assert_close(metrics["policy_loss"] + metrics["kl_loss"], loss.detach())


def test_a_token_of_weight_zero_is_left_out_whatever_it_holds():
    log_probs, old, advantages, weights, ref = batch()
    options = {"ref_log_probs": ref, "kl": "k3", "kl_coef": 0.1, **CLIP}
    loss, metrics = clipped_ratio_loss(log_probs, old, advantages, weights=weights, **options)
    spoilt = log_probs.detach().masked_fill(weights == 0, torch.nan).requires_grad_()
    other_loss, other_metrics = clipped_ratio_loss(spoilt, old, advantages, weights=weights, **options)
    assert other_loss == loss
    assert other_metrics == metrics
    assert torch.equal(torch.autograd.grad(other_loss, spoilt)[0], torch.autograd.grad(loss, log_probs)[0])


def test_is_an_op():
    log_probs, old, advantages, weights, ref = batch(torch.float32)
    arguments = (log_probs, old, advantages, weights, ref, 0.2, 0.3, "k3", 0.1, "clip", "auto")
    opcheck(torch.ops.grpo.clipped_ratio_loss.default, arguments)
    transposed = (log_probs.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), *arguments[1:])
    opcheck(torch.ops.grpo.clipped_ratio_loss.default, transposed)

    def loss(x):
        return clipped_ratio_loss(x, old, advantages, weights=weights, **CLIP)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # Inductor: test_token_log_probs.py
    torch.testing.assert_close(
        torch.autograd.grad(compiled(log_probs), log_probs), torch.autograd.grad(loss(log_probs), log_probs)
    )


def test_refusals():
    log_probs, old, advantages, weights, _ = batch()
    for message, changes in {
        "surrogate is 'ppo'": {"surrogate": "ppo"},
        "kl is 'k4'": {"kl": "k4"},
        "ref_log_probs is None": {"kl": "k1"},
        "old_log_probs is": {"old_log_probs": old[:1]},
        "advantages": {"advantages": advantages[0]},
        "impl is 'fast'": {"impl": "fast"},
    }.items():
        arguments = {"old_log_probs": old, "advantages": advantages, "weights": weights, **CLIP, **changes}
        with pytest.raises(ValueError, match=message):
            clipped_ratio_loss(log_probs, **arguments)
