"""The torch references of `token_log_probs` and `linear_token_log_probs`: values, gradients, refusals."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from grpo.kernels import clipped_ratio_loss, linear_token_log_probs, row_math, token_log_probs
from grpo.kernels.projection import CHUNK_ELEMENTS, KEPT_ELEMENTS, LogitChunks

N, V, D, M = 5, 40, 4, 3


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    tokens = torch.randint(0, V, (N, M), generator=generator)
    tokens[0] = tokens[0, 0]  # one token drawn M times
    return hidden, weight, tokens


def expected(logits, tokens, temperature):
    log_p = (logits.double() / temperature).log_softmax(1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1)
    return log_p.gather(1, tokens), entropy


@pytest.fixture(params=[1, 3])
def chunk_rows(request, monkeypatch):
    """Rows of a chunk: one at a time, and with a last chunk that is shorter."""
    monkeypatch.setattr(row_math, "_CPU_ELEMENTS", request.param * V / torch.get_num_threads())
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", request.param * V)


@pytest.fixture(params=[False, True], ids=["computed again", "kept"])
def way(request, monkeypatch):
    """Where the backward pass of the projection has its logits from."""
    if request.param:
        monkeypatch.setitem(KEPT_ELEMENTS, "cpu", 1 << 24)


@pytest.mark.usefixtures("chunk_rows", "way")
def test_values_and_gradients():
    temperature = 0.7
    hidden, weight, tokens = inputs()
    for actual in (
        token_log_probs(hidden @ weight.T, tokens, temperature=temperature, return_entropy=True),
        linear_token_log_probs(hidden, weight, tokens, temperature=temperature, return_entropy=True),
    ):
        torch.testing.assert_close(actual, expected(hidden @ weight.T, tokens, temperature))
    for entropy in (False, True):
        options = {"temperature": temperature, "return_entropy": entropy}
        logits = (hidden @ weight.T).detach().requires_grad_()
        assert gradcheck(lambda x, options=options: token_log_probs(x, tokens, **options), logits)
        assert gradcheck(
            lambda x, y, options=options: linear_token_log_probs(x, y, tokens, **options), (hidden, weight)
        )


@pytest.mark.usefixtures("way")
def test_an_error_no_larger_than_that_of_torch():
    """fp32 and half precision beside the fp64 truth: products and sums stay in fp32."""
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden = torch.randn(40, 64, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(500, 64, generator=generator).to(dtype).requires_grad_()
        tokens = torch.randint(0, 500, (40, 2), generator=generator)
        truth, _ = expected(hidden.double() @ weight.double().T, tokens, 1.0)
        torch_error = (expected(hidden.float() @ weight.float().T, tokens, 1.0)[0] - truth).abs().max()
        actual = linear_token_log_probs(hidden, weight, tokens)
        assert actual.dtype == torch.float32
        assert (actual - truth).abs().max() <= torch_error + 2e-5
        exact = torch.autograd.grad(truth.sum(), (hidden, weight))
        for gradient, reference in zip(torch.autograd.grad(actual.sum(), (hidden, weight)), exact, strict=True):
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient, reference, atol=5e-5, rtol=1e-2 if dtype.itemsize == 2 else 1e-5)


def test_strided_rows_and_columns_of_minus_infinity():
    _, _, tokens = inputs()
    wide = torch.randn(2 * N, V + 9, generator=torch.Generator().manual_seed(2))
    wide[:, 5:20] = -torch.inf
    tokens = tokens % (V - 20) + 20
    logits = wide[::2, :V].requires_grad_()
    log_p, entropy = token_log_probs(logits, tokens, return_entropy=True)
    torch.testing.assert_close((log_p.double(), entropy.double()), expected(logits, tokens, 1.0), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(log_p.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[:, 5:20].eq(0).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(N), atol=1e-5, rtol=0)
    tokens[0, 0] = 5
    assert token_log_probs(logits, tokens)[0, 0] == -torch.inf


def test_kept_logits_serve_more_than_one_backward_pass(monkeypatch):
    products = []
    monkeypatch.setattr(
        LogitChunks, "product", lambda chunks, *a, f=LogitChunks.product: (products.append(1), f(chunks, *a))
    )
    monkeypatch.setitem(KEPT_ELEMENTS, "cpu", N * V)
    hidden, weight, tokens = inputs()
    loss = linear_token_log_probs(hidden, weight, tokens, temperature=0.7).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first, rtol=0, atol=0)
    assert len(products) == 1
    with torch.no_grad():  # nothing is kept for nobody
        assert not torch.ops.grpo.linear_token_log_probs(hidden, weight, tokens, 1.0, False, False, "auto")[3].numel()


@pytest.mark.usefixtures("way")
def test_a_frozen_head_gets_no_gradient_and_no_rows_no_error():
    hidden, weight, tokens = inputs()
    linear_token_log_probs(hidden, weight.detach(), tokens).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    _, grad_weight = torch.ops.grpo.linear_token_log_probs_backward(
        torch.ones(N, M).double(), None, hidden, weight, tokens, torch.zeros(N).double(), torch.empty(0), None,
        1.0, True, False, "auto",
    )  # fmt: skip
    assert grad_weight.numel() == 0
    nothing = linear_token_log_probs(hidden[:0], weight, tokens[:0])
    nothing.sum().backward()
    assert nothing.shape == (0, M)
    assert weight.grad.eq(0).all()


def test_are_ops():
    hidden, weight, tokens = inputs(torch.float32)
    logits = (hidden @ weight.T).detach().requires_grad_()
    opcheck(torch.ops.grpo.token_log_probs.default, (logits, tokens, 0.7, True, "auto"))
    for keep in (False, True):
        opcheck(torch.ops.grpo.linear_token_log_probs.default, (hidden, weight, tokens, 0.7, True, keep, "auto"))

    def loss(hidden, weight):
        log_p, entropy = linear_token_log_probs(hidden, weight, tokens, return_entropy=True)
        policy, metrics = clipped_ratio_loss(
            log_p[None], log_p.detach()[None] - 0.1, log_p.detach()[None, :, 0], weights=torch.ones_like(log_p)[None],
            clip_low=0.2, clip_high=0.2,
        )  # fmt: skip
        return policy + metrics["ratio"] + entropy.sum() + token_log_probs(hidden @ weight.T, tokens).sum()

    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    torch.testing.assert_close(actual, torch.autograd.grad(loss(hidden, weight), (hidden, weight)))


def test_refusals():
    hidden, weight, tokens = inputs()
    for message, call in {
        "temperature is 0": lambda: token_log_probs(hidden, tokens, temperature=0),
        "temperature is inf": lambda: linear_token_log_probs(hidden, weight, tokens, temperature=float("inf")),
        "tokens must lie in 0 .. 3; found -1": lambda: token_log_probs(hidden, tokens % D - 1),
        "tokens must lie in 0 .. 39; found 40": lambda: linear_token_log_probs(
            hidden, weight, tokens + 40 - tokens.max()
        ),
        "V > 0": lambda: token_log_probs(hidden[:, :0], tokens),
        "tokens": lambda: token_log_probs(hidden, tokens[:-1]),
        "int64": lambda: linear_token_log_probs(hidden, weight, tokens.int()),
        "weight must be": lambda: linear_token_log_probs(hidden, weight[:, 1:], tokens),
        "impl is 'fast'": lambda: token_log_probs(hidden, tokens % D, impl="fast"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
