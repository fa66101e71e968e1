"""The Triton kernels of both log-prob ops beside the fp64 reference. Run by `test_triton.py`."""

import pytest
import torch

from grpo.kernels import (
    linear_token_log_probs,
    sample_and_score,
    token_log_probs,
    triton_linear_log_probs,
    triton_log_probs,
)
from grpo.kernels.projection import CHUNK_ELEMENTS, KEPT_ELEMENTS
from grpo.kernels.row_math import ScoredRows, new_outputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter gets it wrong
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tokens_of(N, M, V):
    tokens = torch.randint(0, V, (N, M), generator=torch.Generator().manual_seed(1))
    tokens[:1] = tokens[:1, :1]  # one token drawn M times
    return tokens.to(DEVICE)


def run(op, inputs, tokens, impl, entropy):
    """Outputs and gradients under fixed upstream gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = op(*inputs, tokens, temperature=0.8, return_entropy=entropy, impl=impl)
    outputs = outputs if entropy else (outputs,)
    loss = sum((output * random(*output.shape, seed=i)).sum() for i, output in enumerate(outputs))
    return *outputs, *torch.autograd.grad(loss, inputs)


def assert_as_good_as_torch(op, inputs, tokens, entropy):
    """The kernels' error may not exceed that of the torch reference by more than a tolerance."""
    truth = run(op, [tensor.double() for tensor in inputs], tokens, "reference", entropy)
    reference = run(op, inputs, tokens, "reference", entropy)
    actual = run(op, inputs, tokens, "triton", entropy)
    for ours, theirs, true in zip(actual, reference, truth, strict=True):
        assert ours.dtype == theirs.dtype
        allowed = (theirs - true).abs().nan_to_num(0).max() + TOLERANCE[ours.dtype] * max(
            1, true.abs().nan_to_num(0).max()
        )
        torch.testing.assert_close(ours.double(), true, atol=allowed.item(), rtol=0)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V", "M"), [(5, 300, 3), (2, 16384, 8), (2, 20_000, 1), (3, 7, 2)])
def check_rows_of_logits(N, V, M, dtype, entropy):
    assert_as_good_as_torch(token_log_probs, [3 * random(N, V, dtype=dtype)], tokens_of(N, M, V), entropy)


def check_strided_rows_ties_and_minus_infinity():
    logits = random(8, 309)
    logits[:, :20] = -torch.inf
    logits[2, 20:] = 0.0
    logits[4, 20:] = logits[4, 20:].round()
    tokens = tokens_of(4, 3, 280) + 20
    assert_as_good_as_torch(token_log_probs, [logits[::2, :300]], tokens, True)
    tokens[1, 1] = 3
    assert token_log_probs(logits[::2, :300], tokens, impl="triton")[1, 1] == -torch.inf


@pytest.fixture(params=[0, 1 << 24], ids=["computed again", "kept"])
def way(request, monkeypatch):
    """Where the backward pass of the projection has its logits from."""
    monkeypatch.setitem(KEPT_ELEMENTS, DEVICE, request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "V", "D", "M", "entropy"), [(5, 300, 40, 3, False), (5, 300, 40, 3, True), (130, 2100, 32, 2, True)]
)
def check_projection(N, V, D, M, dtype, entropy):
    """Ragged in rows, columns and features; the second case spans two tiles of rows and two splits of columns."""
    inputs = [random(N, D, dtype=dtype), random(V, D, dtype=dtype, seed=1) / 4]
    assert_as_good_as_torch(linear_token_log_probs, inputs, tokens_of(N, M, V), entropy)


@pytest.mark.usefixtures("way")
def check_projection_in_chunks_and_with_a_frozen_head(monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, DEVICE, 2 * 300)
    hidden, weight, tokens = random(5, 40), random(300, 40, seed=1), tokens_of(5, 2, 300)
    assert_as_good_as_torch(linear_token_log_probs, [hidden, weight], tokens, True)
    hidden.requires_grad_()
    gradients = [
        torch.autograd.grad(linear_token_log_probs(hidden, weight, tokens, impl=impl).sum(), hidden)
        for impl in ("triton", "reference")
    ]
    torch.testing.assert_close(*gradients)


def check_a_row_of_the_projection_does_not_depend_on_the_batch():
    """Whole numbers, whose products are exact: the interpreter's own product rounds by the place in a tile."""
    hidden, weight = (random(n, 32, seed=n).mul(2).round().half() for n in (9, 2100))
    tokens = tokens_of(9, 2, 2100)
    whole = linear_token_log_probs(hidden, weight, tokens, impl="triton")
    parts = [linear_token_log_probs(hidden[i], weight, tokens[i], impl="triton") for i in (slice(0, 4), slice(4, 9))]
    assert torch.equal(torch.cat(parts), whole)


def check_no_rows():
    """Log-probs, and draws scored, of nothing: shapes, and gradients of zero."""
    hidden, weight = (random(n, 40).requires_grad_() for n in (0, 300))
    row_ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    scored = sample_and_score(hidden, weight, num_samples=2, seed=0, row_ids=row_ids, targets=row_ids, impl="triton")
    assert scored.tokens.shape == scored.log_probs.shape == (0, 2)
    given = linear_token_log_probs(hidden, weight, scored.tokens, impl="triton")
    for log_probs in (scored.log_probs, given):
        grad_hidden, grad_weight = torch.autograd.grad(log_probs.sum(), (hidden, weight))
        assert grad_hidden.shape == (0, 40)
        assert grad_weight.eq(0).all()


def check_a_token_out_of_range_is_seen_and_touches_nothing():
    """On a GPU nobody looks at the tokens before the kernels do."""
    V = 300
    memory = random(4, V + 8)
    logits, tokens = memory[1:3, :V], torch.tensor([[5, V], [-1, 7]], device=DEVICE)
    log_probs, lse, entropy = outputs = new_outputs(tokens, True, logits)
    triton_log_probs.launch_forward(logits, tokens, 0.8, *outputs)
    wrong = torch.tensor([[False, True], [True, False]], device=DEVICE)
    assert torch.equal(log_probs.isnan(), wrong)
    assert lse.isfinite().all()
    gradients = torch.zeros_like(memory)
    scored = ScoredRows(tokens, lse, entropy, torch.ones(2, 2, device=DEVICE), None)
    triton_log_probs.launch_backward(logits, scored, 0.8, gradients[1:3, :V])
    assert gradients[1:3, :V].isnan().all()
    assert gradients[[0, 3]].eq(0).all()
    assert gradients[:, V:].eq(0).all()
    hidden, weight = random(2, 16, dtype=torch.float16), random(V, 16, dtype=torch.float16)
    log_probs, _, _ = triton_linear_log_probs.launch_forward(hidden, weight, tokens, 0.8, False)
    assert torch.equal(log_probs.isnan(), wrong)


def check_rows_without_tokens_have_an_entropy():
    logits, tokens = random(3, 40), torch.zeros(3, 0, dtype=torch.int64, device=DEVICE)
    for op, inputs in ((token_log_probs, [logits]), (linear_token_log_probs, [logits, random(50, 40)])):
        results = [run(op, inputs, tokens, impl, True) for impl in ("triton", "reference")]
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("V", [300, 40_000])
def check_gradient_over_the_logits(V, dtype):
    """The gradient written over the fp32 logits, in their type or in half of their bytes, as the projection does."""
    logits, tokens, grads = random(3, V), tokens_of(3, 4, V), random(3, 4, seed=2)
    outputs = new_outputs(tokens, False, logits)
    triton_log_probs.launch_forward(logits, tokens, 0.8, *outputs)
    scored, apart = ScoredRows(tokens, *outputs[1:], grads, None), torch.empty_like(logits, dtype=dtype)
    triton_log_probs.launch_backward(logits, scored, 0.8, apart)
    over = logits.view(dtype)[:, :V]
    triton_log_probs.launch_backward(logits, scored, 0.8, over)
    assert torch.equal(over, apart)
