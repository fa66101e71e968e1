"""What only a GPU can show of the kernels: bf16, 64-bit offsets, the same bits from run to run, CUDA graphs.

The comparisons with the references run on the GPU through `test_triton.py`.
"""

import pytest
import torch

from grpo.kernels import clipped_ratio_loss, linear_token_log_probs, sample_tokens, token_log_probs
from grpo.kernels.projection import KEPT_ELEMENTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=[0, 1 << 27], ids=["computed again", "kept"])
def way(request, monkeypatch):
    """Where the backward pass of the projection has its logits from."""
    monkeypatch.setitem(KEPT_ELEMENTS, "cuda", request.param)


def projection(dtype=torch.bfloat16, N=4100, V=16384, D=768, M=8):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator, device="cuda") / 16).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N, M), generator=generator, device="cuda")


@pytest.mark.usefixtures("way")
def test_the_same_bits_from_run_to_run():
    hidden, weight, tokens = projection()
    runs = []
    for _ in range(2):
        log_probs, entropy = linear_token_log_probs(hidden, weight, tokens, return_entropy=True, impl="triton")
        gradients = torch.autograd.grad(log_probs.sum() + entropy.sum(), (hidden, weight))
        logits = (hidden[:600] @ weight.T).detach().requires_grad_()
        chosen = token_log_probs(logits, tokens[:600], impl="triton")
        sample = sample_tokens(logits, num_samples=8, top_k=500, top_p=0.9, seed=0, impl="triton")
        runs.append((log_probs, entropy, *gradients, *torch.autograd.grad(chosen.sum(), logits), *sample))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("D", [768, 1536])  # tiles in registers; chunks by the library
def test_bf16_projection_is_as_good_as_torch(D):
    hidden, weight, tokens = projection(N=300, D=D)
    truth = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, tokens)
    torch_error = ((hidden.float() @ weight.float().T).log_softmax(1).gather(1, tokens) - truth).abs().max()
    actual = linear_token_log_probs(hidden, weight, tokens, impl="triton")
    assert (actual - truth).abs().max() <= torch_error + 1e-4
    expected = torch.autograd.grad(truth.sum(), (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(actual.sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05 * theirs.abs().max().item(), rtol=0.02)


def test_more_than_2_to_the_31_logits():
    N, V = 131_200, 16_384
    logits = torch.empty(N, V, dtype=torch.bfloat16, device="cuda")
    for chunk in logits.split(8192):
        chunk.normal_()
    tokens = torch.randint(0, V, (N, 2), device="cuda")
    last = slice(N - 64, N)
    actual = token_log_probs(logits.requires_grad_(), tokens, impl="triton")
    torch.testing.assert_close(actual[last], token_log_probs(logits[last], tokens[last], impl="reference"))
    (gradient,) = torch.autograd.grad(actual.sum(), logits)
    part = logits[last].detach().requires_grad_()
    expected = torch.autograd.grad(token_log_probs(part, tokens[last], impl="reference").sum(), part)
    torch.testing.assert_close(gradient[last], *expected, atol=1e-5, rtol=0.01)
    del gradient
    row_ids = torch.arange(N, device="cuda")
    whole = sample_tokens(logits, seed=0, row_ids=row_ids, impl="triton")
    assert torch.equal(
        whole.tokens[last], sample_tokens(logits[last], seed=0, row_ids=row_ids[last], impl="triton").tokens
    )


def test_a_cuda_graph_replays_with_another_step():
    logits, step = torch.randn(64, 16_384, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    old, weights = torch.randn(64, 2, 1, device="cuda"), torch.ones(64, 2, 1, device="cuda")
    advantages = torch.randn(64, 2, device="cuda")

    def work():
        sample = sample_tokens(logits, num_samples=2, top_p=0.9, seed=1, step=step, impl="triton")
        loss, _ = clipped_ratio_loss(
            sample.log_probs[..., None],
            old,
            advantages,
            weights=weights,
            clip_low=0.2,
            clip_high=0.2,
            impl="triton",
        )
        return sample.tokens, loss

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, loss = work()
    for value in (3, 4):
        step.fill_(value)
        graph.replay()
        expected_tokens, expected_loss = work()
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(loss, expected_loss)


def policy_inputs(R=64, M=8, T=576):
    generator = torch.Generator("cuda").manual_seed(0)
    new, old = (torch.randn(R, T, M + 1, generator=generator, device="cuda") for _ in range(2))
    new, old = (tensor[..., :M].transpose(1, 2) for tensor in (new, old))
    return new, old / 8 + new, torch.randn(R, M, generator=generator, device="cuda"), torch.full_like(new, 1e-5)


def test_the_loss_is_one_launch_and_gives_the_same_bits_whatever_else_runs():
    """In any layout, on streams that run at the same time: their programs end in any order."""
    log_probs, old, advantages, weights = policy_inputs()
    arguments = (log_probs, old, advantages, weights, None, 0.2, 0.28, "k3", 0.0, "clip", "triton")

    def run():
        return torch.ops.grpo.clipped_ratio_loss(*arguments)

    expected = run()
    reference = torch.ops.grpo.clipped_ratio_loss(*arguments[:-1], "reference")
    torch.testing.assert_close(expected, reference, rtol=1e-4, atol=1e-6)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1, launched
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run()[:2])
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


def test_tokens_out_of_range_are_seen():
    hidden, weight, tokens = projection(N=64)
    tokens[3, 2], tokens[5, 0] = 16384, -1
    for log_probs in (
        token_log_probs(hidden @ weight.T, tokens, impl="triton"),
        linear_token_log_probs(hidden, weight, tokens, impl="triton"),
    ):
        assert log_probs.isnan().nonzero().tolist() == [[3, 2], [5, 0]]
        (gradient,) = torch.autograd.grad(log_probs.nan_to_num().sum(), hidden, retain_graph=True)
        assert gradient[[3, 5]].isnan().all()
