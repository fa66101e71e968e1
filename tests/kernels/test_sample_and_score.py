"""`sample_and_score` and `sample_projection`: what they are made of, the two ways to the gradient, no rows, `Draw`."""

import sys

import pytest
import torch

from grpo.kernels import (
    Draw,
    linear_token_log_probs,
    project_logits,
    sample_and_score,
    sample_projection,
    sample_tokens,
)
from grpo.kernels.projection import CHUNK_ELEMENTS

N, V, D, M = 7, 60, 5, 3
module = sys.modules[sample_and_score.__module__]  # the package has a function of its name


@pytest.fixture(autouse=True)
def chunks_of_three_rows(monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 3 * V)


@pytest.fixture(params=[True, False], ids=["kept", "computed again"])
def way(request, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_ELEMENTS", {"cpu": 1 << 24} if request.param else {})


def inputs(dtype=torch.float32, rows=N):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator).to(dtype).requires_grad_() for n in (rows, V))
    return hidden, weight, torch.arange(rows) * 5


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}], ids=str)
def test_is_a_draw_and_its_log_probs(dtype, filters):
    hidden, weight, row_ids = inputs(dtype)
    targets = torch.arange(N)
    scored = sample_and_score(hidden, weight, num_samples=M, seed=1, row_ids=row_ids, targets=targets, **filters)
    sample = sample_tokens(project_logits(hidden, weight), num_samples=M, seed=1, row_ids=row_ids, **filters)
    assert torch.equal(scored.tokens, sample.tokens)
    torch.testing.assert_close(scored.kept_mass, sample.kept_mass)
    tokens, temperature = torch.cat([sample.tokens, targets[:, None]], dim=1), filters.get("temperature", 1.0)
    expected, entropy = linear_token_log_probs(hidden, weight, tokens, temperature=temperature, return_entropy=True)
    actual = torch.cat([scored.log_probs, scored.target_log_probs[:, None]], dim=1)
    torch.testing.assert_close((actual, scored.entropy), (expected, entropy))
    loss, expected_loss = actual.sum() - scored.entropy.sum(), expected.sum() - entropy.sum()
    gradients = torch.autograd.grad(expected_loss, (hidden, weight))
    for _ in range(2):  # the second pass has no logits left to use
        torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight), retain_graph=True), gradients)


@pytest.mark.usefixtures("way")
def test_no_rows_give_empty_results_and_gradients_of_zero():
    hidden, weight, row_ids = inputs(rows=0)
    for targets in (None, row_ids):
        scored = sample_and_score(hidden, weight, num_samples=M, seed=1, row_ids=row_ids, targets=targets)
        assert scored.tokens.shape == scored.log_probs.shape == (0, M)
        assert scored.tokens.dtype == torch.int64
        assert scored.kept_mass.shape == scored.entropy.shape == (0,)
        assert targets is None or scored.target_log_probs.shape == (0,)
        grad_hidden, grad_weight = torch.autograd.grad(scored.log_probs.sum(), (hidden, weight))
        assert grad_hidden.shape == (0, D)
        assert grad_weight.eq(0).all()
    tokens, log_probs, kept_mass = sample_projection(hidden, weight, row_ids=row_ids, num_samples=M, seed=1, top_k=4)
    assert tokens.shape == log_probs.shape == (0, M)
    assert kept_mass.shape == (0,)


@pytest.mark.usefixtures("way")
def test_a_frozen_head_gets_no_gradient():
    hidden, weight, row_ids = inputs()
    sample_and_score(hidden, weight.detach(), num_samples=M, seed=1, row_ids=row_ids).log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_draw_carries_its_settings_to_every_operation():
    hidden, weight, row_ids = inputs()
    settings = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 4, "impl": "reference"}
    draw, rows = Draw(**settings), {"row_ids": row_ids, "num_samples": M}
    logits = project_logits(hidden, weight)
    for ours, expected in (
        (draw.sample(logits, **rows), sample_tokens(logits, **rows, **settings)),
        (draw.sample_projection(hidden, weight, **rows), sample_projection(hidden, weight, **rows, **settings)),
        (draw.sample_and_score(hidden, weight, **rows), sample_and_score(hidden, weight, **rows, **settings)),
    ):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    tokens = draw.sample(logits, **rows).tokens
    log_probs, entropy = draw.score(hidden, weight, tokens)
    expected = linear_token_log_probs(hidden, weight, tokens, temperature=0.8, return_entropy=True)
    assert torch.equal(log_probs, expected[0])
    assert torch.equal(entropy, expected[1])
    assert draw.truncates
    assert not Draw(temperature=0.8).truncates
