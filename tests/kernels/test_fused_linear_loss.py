"""`fused_linear_loss` beside log-probs and a loss apart: values, gradients, chunks, what it costs, refusals."""

import pytest
import torch

from grpo.kernels import clipped_ratio_loss, fused_linear_loss, linear_token_log_probs
from grpo.kernels.linear_chunks import CHUNK_ELEMENTS

CONTEXTS, T, V, D, M = 3, 4, 40, 5, 3


@pytest.fixture(autouse=True)
def two_contexts_a_chunk(monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", (2 * T + 1) * V)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(CONTEXTS * T, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (CONTEXTS * T, M), generator=generator)


def policy_objective(dtype=torch.float64):
    """A clipped loss over whole contexts with an entropy bonus, as a function of a chunk's rows."""
    generator = torch.Generator().manual_seed(1)
    old = -4 + torch.randn(CONTEXTS, M, T, generator=generator, dtype=dtype)
    advantages = torch.randn(CONTEXTS, M, generator=generator, dtype=dtype)

    def objective(rows, log_probs, entropy):
        contexts = slice(rows.start // T, rows.stop // T)
        log_probs = log_probs.view(-1, T, M).transpose(1, 2)  # [R, M, T]
        weights = torch.full_like(log_probs, 1 / old.numel()).detach()
        clip = {"clip_low": 0.2, "clip_high": 0.3}
        loss, _ = clipped_ratio_loss(log_probs, old[contexts], advantages[contexts], weights=weights, **clip)
        return loss - 0.01 * entropy.sum()

    return objective


def test_equals_log_probs_and_loss_apart():
    hidden, weight, tokens = inputs()
    objective, seen = policy_objective(), []

    def noted(rows, log_probs, entropy):
        seen.append((rows.start, rows.stop))
        return objective(rows, log_probs, entropy)

    options = {"temperature": 0.7}
    fused = fused_linear_loss(hidden, weight, tokens, noted, with_entropy=True, group=T, **options)
    assert seen == [(0, 8), (8, 12)]  # whole contexts, each once
    apart = objective(slice(0, 12), *linear_token_log_probs(hidden, weight, tokens, return_entropy=True, **options))
    torch.testing.assert_close(fused, apart)
    gradients = [torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True) for loss in (fused, apart)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(RuntimeError, match="backward has run already"):
        fused.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_types_of_the_inputs(dtype):
    hidden, weight, tokens = inputs(dtype)
    losses = [
        fused_linear_loss(hidden, weight, tokens, lambda rows, log_probs, _: log_probs.sum()),
        linear_token_log_probs(hidden, weight, tokens).sum(),
    ]
    torch.testing.assert_close(*losses)
    for ours, expected in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected)


def products(function):
    """How many matrix products a function makes, by the name of torch's own operations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())


def test_three_products_where_the_log_probs_alone_need_four():
    hidden, weight, tokens = inputs(torch.float32)

    def fused():
        loss = fused_linear_loss(hidden, weight, tokens, lambda rows, log_probs, _: log_probs.sum())
        return torch.autograd.grad(loss, (hidden, weight))

    def apart():
        return torch.autograd.grad(linear_token_log_probs(hidden, weight, tokens).sum(), (hidden, weight))

    chunks = 2
    assert products(fused) == 3 * chunks
    assert products(apart) == 4 * chunks


def test_what_needs_no_gradient_gets_none():
    hidden, weight, tokens = inputs(torch.float32)

    def loss(rows, log_probs, _):
        return log_probs.sum()

    fused_linear_loss(hidden, weight.detach(), tokens, loss).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not fused_linear_loss(hidden, weight, tokens, loss).requires_grad
        assert products(lambda: fused_linear_loss(hidden, weight, tokens, loss)) == 2  # one for each chunk
    constant = fused_linear_loss(hidden, weight, tokens, lambda rows, log_probs, _: torch.ones(()))
    assert constant == 2  # chunks
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(constant, (hidden, weight)))
    nothing = fused_linear_loss(hidden[:0], weight, tokens[:0], loss)
    nothing.backward()
    assert nothing == 0


def test_refusals():
    hidden, weight, tokens = inputs()
    for message, changes in {
        "group is 5; it must divide the number of rows, 12": {"group": 5},
        "tokens must lie in 0 .. 39; found 40": {"tokens": tokens + (40 - tokens.max())},
        "weight must be": {"weight": weight[:, 1:]},
        "temperature is -1": {"temperature": -1},
        "impl is 'fast'": {"impl": "fast"},
        "not on a GPU": {"impl": "triton"},
    }.items():
        arguments = {"weight": weight, "tokens": tokens, **changes}
        with pytest.raises(ValueError, match=message):
            fused_linear_loss(hidden, loss=lambda rows, log_probs, _: log_probs.sum(), **arguments)
