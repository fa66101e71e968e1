"""Losses of CCA and GFT, by hand and against plain arithmetic in fp64."""

import math

import pytest
import torch

from grpo.objectives import contrastive_alignment, guidance_free_log_probs


def test_contrastive_alignment_by_hand():
    """beta 1/2, lambda 4. First image: r+ = 2 ln 3, r- = -2 ln 3; second one, same condition: r+ = r- = 2 ln 3."""
    ln3 = math.log(3)
    positive = torch.tensor([2 * ln3, 2 * ln3], dtype=torch.float64)
    negative = torch.tensor([-2 * ln3, 2 * ln3], dtype=torch.float64)
    same = torch.tensor([False, True])
    loss, means = contrastive_alignment(positive, negative, same_condition=same, beta=0.5, negative_weight=4.0)
    term = math.log(4 / 3)  # -log s(ln 3)
    assert loss.item() == pytest.approx(((1 + 4) * term + (1 + 1) * term) / 2 / 4, abs=1e-12)
    assert means["accuracy"].item() == 0.5
    assert means["log_ratio"].item() == pytest.approx(2 * ln3)
    assert means["other_log_ratio"].item() == pytest.approx(0)


def test_contrastive_alignment_draws_apart_but_not_what_has_the_same_condition():
    positive, negative = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    same = torch.tensor([False, True])
    contrastive_alignment(positive, negative, same_condition=same, beta=1.0, negative_weight=3.0)[0].backward()
    # slopes of -log s at 0 are -1/2; a mean over 2, divided by 3
    torch.testing.assert_close(positive.grad, torch.tensor([-1 / 12, -1 / 12], dtype=torch.float64))
    torch.testing.assert_close(negative.grad, torch.tensor([3 / 12, -1 / 12], dtype=torch.float64))


def test_small_weights_of_negatives_do_not_raise_the_loss():
    r, same = torch.zeros(1), torch.tensor([False])
    loss, _ = contrastive_alignment(r, r, same_condition=same, beta=1.0, negative_weight=0.5)
    assert loss.item() == pytest.approx(1.5 * math.log(2))


def test_guidance_free_log_probs_and_gradients():
    torch.manual_seed(0)
    conditional, unconditional, weight = (torch.randn(s, dtype=torch.float64) for s in ((5, 3), (5, 3), (7, 3)))
    tokens, results = torch.randint(7, (5, 1)), []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (conditional, unconditional, weight)]
        if ours:
            log_probs = guidance_free_log_probs(*leaves, tokens, beta=0.6)
        else:
            c, u, w = leaves
            mixed = 0.6 * (c @ w.T) + 0.4 * (u @ w.T).detach()
            log_probs = mixed.log_softmax(1).gather(1, tokens)
        log_probs.sum().backward()
        assert leaves[1].grad is None
        results.append((log_probs, leaves[0].grad, leaves[2].grad))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


def test_guidance_free_optimum_is_the_guided_distribution():
    """Where the mixture is the conditional distribution, the conditional logits are those of guidance 1 / beta."""
    logits, unconditional = torch.randn(1, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    guided = unconditional + (logits - unconditional) / 0.5
    tokens, eye = torch.arange(6)[None], torch.eye(6, dtype=torch.float64)
    mixed = guidance_free_log_probs(guided, unconditional, eye, tokens, beta=0.5)
    torch.testing.assert_close(mixed, logits.log_softmax(1))
