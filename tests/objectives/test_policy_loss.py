"""The policy loss: hand-computed cases, gradients in fp64, normalisers."""

import math

import pytest
import torch

from grpo.objectives import highest_entropy, policy_loss, token_weights

OLD = torch.full((1, 2, 2), -1.0)
# Ratios 1.5 and 0.5 in the first completion (advantage 2), 1.5 and 0.9 in the second (advantage -1).
NEW = OLD + torch.tensor([[[1.5, 0.5], [1.5, 0.9]]]).log()
ADVANTAGES = torch.tensor([[2.0, -1.0]])
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def test_clipped_surrogate_by_hand():
    """-min(2*1.5, 2*1.3) = -2.6, -min(2*.5, 2*.8) = -1, -min(-1.5, -1.3) = 1.5, -min(-.9, -.9) = 0.9."""
    loss, metrics = policy_loss(NEW, OLD, ADVANTAGES, **CLIP)
    assert loss.item() == pytest.approx((-2.6 - 1.0 + 1.5 + 0.9) / 4)
    assert metrics["tokens"] == 4
    assert metrics["clipped_high"] == 1  # 1.5 under a positive advantage
    assert metrics["clipped_low"] == 0  # 0.5 has a positive advantage: not clipped away
    assert metrics["outside"] == 3
    assert metrics["ratio"].item() == pytest.approx(1.5 + 0.5 + 1.5 + 0.9)


def test_cispo_by_hand():
    """-clip(ratio, 0.8, 1.3) A log p, per token."""
    loss, _ = policy_loss(NEW, OLD, ADVANTAGES, loss="cispo", **CLIP)
    tokens = [(1.3, 2, 1.5), (0.8, 2, 0.5), (1.3, -1, 1.5), (0.9, -1, 0.9)]
    expected = sum(-bounded * advantage * (math.log(ratio) - 1.0) for bounded, advantage, ratio in tokens) / 4
    assert loss.item() == pytest.approx(expected)


def test_gspo_by_hand():
    """Sequence ratios are geometric means: sqrt(0.75) and sqrt(1.35)."""
    loss, metrics = policy_loss(NEW, OLD, ADVANTAGES, loss="gspo", **CLIP)
    first, second = math.sqrt(0.75), math.sqrt(1.35)
    assert loss.item() == pytest.approx((-2 * first + second) / 2)
    assert (metrics["sequences"], metrics["tokens"]) == (2, 4)


@pytest.mark.parametrize(("kl", "expected"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5)])
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_kl_estimators_by_hand(kl, expected, loss):
    """log p_ref - log p = 0.5 at every token."""
    penalty = {"ref_log_probs": NEW + 0.5, "kl": kl, "kl_coef": 0.1}
    plain, _ = policy_loss(NEW, OLD, ADVANTAGES, loss=loss, **CLIP)
    penalised, metrics = policy_loss(NEW, OLD, ADVANTAGES, loss=loss, **CLIP, **penalty)
    assert (penalised - plain).item() == pytest.approx(0.1 * expected, rel=1e-4)
    assert (metrics["kl_ref"] / metrics["tokens"]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_kl_of_sequences_by_hand(loss):
    """d = (1.0 + 0.2) / 2 in one sequence, -0.4 in the other; the coefficient is 3, the mean is over two sequences."""
    difference = torch.tensor([[[1.0, 0.2], [-0.7, -0.1]]])
    penalty = {"ref_log_probs": NEW + difference, "kl": "k3", "kl_coef": 3.0, "kl_level": "sequence"}
    plain, before = policy_loss(NEW, OLD, ADVANTAGES, loss=loss, **CLIP)
    penalised, metrics = policy_loss(NEW, OLD, ADVANTAGES, loss=loss, **CLIP, **penalty)
    estimates = [math.exp(d) - d - 1 for d in (0.6, -0.4)]
    assert (penalised - plain).item() == pytest.approx(3 * sum(estimates) / 2, rel=1e-5)
    assert metrics["kl_ref"].item() == pytest.approx(sum(estimates), rel=1e-5)
    assert metrics["kl_loss"].item() == pytest.approx(3 * sum(estimates) / 2, rel=1e-5)
    assert (metrics["sequences"], metrics["tokens"]) == (2, 4)
    assert metrics["ratio"] == before["ratio"]


def test_a_sequence_without_weight_is_left_out():
    weights = torch.tensor([[[0.25, 0.25], [0.0, 0.0]]])
    loss, metrics = policy_loss(NEW, OLD, ADVANTAGES, loss="gspo", weights=weights, **CLIP)
    assert loss.item() == pytest.approx(-math.sqrt(0.75))
    assert metrics["sequences"] == 1


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize(("kl", "level"), [(kl, "token") for kl in ("none", "k1", "k2", "k3")] + [("k3", "sequence")])
def test_gradients_in_fp64(loss, kl, level):
    """Finite differences, away from the kinks of the clip; cispo's ratio is a constant, so its truth differs."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, 5)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    new = (old + 0.8 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    weights = token_weights(shape, loss=loss, sequences=6, keep=torch.rand(shape, generator=generator) < 0.8).double()
    arguments = {
        "weights": weights,
        "loss": loss,
        "ref_log_probs": old - 0.3,
        "kl": kl,
        "kl_coef": 0.05,
        "kl_level": level,
        **CLIP,
    }

    def value(log_probs):
        return policy_loss(log_probs, old, advantages, **arguments)[0]

    if loss == "cispo":
        bounded = (new.detach() - old).exp().clamp(0.8, 1.3)
        difference = old - 0.3 - new
        if level == "sequence":
            share = weights / weights.sum(dim=-1, keepdim=True)
            difference = (share * difference).sum(dim=-1, keepdim=True)
        penalty = {"none": 0 * new, "k1": -difference, "k2": difference**2 / 2, "k3": difference.exp() - difference - 1}
        truth = (weights * (0.05 * penalty[kl] - bounded * advantages[..., None] * new)).sum()
        torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (value(new), truth)))
        return
    assert torch.autograd.gradcheck(value, (new,), eps=1e-6, atol=1e-6)


def test_weights_are_the_documented_means():
    keep = torch.tensor([[[True, True, False, False], [True, True, True, True]]])
    grpo = token_weights((1, 2, 4), loss="grpo", sequences=2, keep=keep)
    torch.testing.assert_close(grpo, torch.tensor([[[0.25, 0.25, 0.0, 0.0], [0.125] * 4]]))
    dapo = token_weights((1, 2, 4), loss="dapo", sequences=2, keep=keep, keep_probability=0.75)
    torch.testing.assert_close(dapo, keep / 6.0)
    torch.testing.assert_close(token_weights((1, 2, 4), loss="dr_grpo", sequences=2, keep=keep), keep / 8.0)
    torch.testing.assert_close(token_weights((1, 2, 4), loss="gspo", sequences=2), torch.full((1, 2, 4), 1 / 8))


def test_positions_of_highest_entropy():
    entropy = torch.tensor([[0.1, 0.4, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    chosen = highest_entropy(entropy, 2)
    assert chosen[0].tolist() == [False, True, True, False]
    assert chosen[1].sum() == 2  # as many where all are alike


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="unknown policy loss"):
        policy_loss(NEW, OLD, ADVANTAGES, loss="ppo")
