"""The Triton kernel of `sample_tokens` beside its reference. Run by `test_triton.py`."""

from pathlib import Path

import pytest
import torch

from grpo.kernels import sample_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARITY = Path(__file__).parents[2] / "fixtures/llamagen/sampling_filter.pt"
FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 20, "temperature": 1.3},
    {"top_p": 0.0},
    {"top_p": 0.9},
    {"top_k": 50, "top_p": 0.5},
    {"top_k": 10_000, "top_p": 0.999},
]


def hard_rows(V, dtype=torch.float32):
    """Ties everywhere, all equal, columns of -inf, signed zeros, one hot."""
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(V)) * 2
    logits[1] = logits[1].round()
    logits[2] = 0.0
    logits[3, ::3] = -torch.inf
    logits[4] = logits[4].round() * 0.0
    logits[5] = -torch.inf
    logits[5, V // 2] = 3.0
    return logits.to(DEVICE, dtype)


def assert_same_sample(logits, **options):
    options = {"seed": 2**40 + 5, "step": 7, "row_ids": torch.arange(len(logits), device=DEVICE) + 2**33, **options}
    actual = sample_tokens(logits, impl="triton", **options)
    expected = sample_tokens(logits, impl="reference", **options)
    assert torch.equal(actual.tokens, expected.tokens)
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=2e-6, equal_nan=True)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def check_equals_the_reference(filters):
    assert_same_sample(hard_rows(300), num_samples=3, **filters)


def check_a_vocabulary_smaller_than_a_block():
    assert_same_sample(hard_rows(5), num_samples=3, top_k=3, top_p=0.9)


@pytest.mark.parametrize("filters", [{}, {"top_k": 1000, "top_p": 0.9, "temperature": 0.9}], ids=str)
def check_equals_the_reference_on_a_whole_codebook(filters):
    assert_same_sample(hard_rows(16384)[:2], num_samples=8, **filters)


@pytest.mark.parametrize("given", [False, True], ids=["counted", "noise"])
def check_more_draws_than_are_made_at_once(given):
    noise = torch.randn(6, 37, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE) if given else None
    assert_same_sample(hard_rows(300), num_samples=37, top_k=50, noise=noise)


def check_half_precision_strided_rows_and_given_noise():
    logits = hard_rows(301, torch.float16)[:, :300]
    assert_same_sample(logits, num_samples=2, top_p=0.8)
    noise = torch.randn(6, 2, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for filters in ({}, {"top_k": 7, "top_p": 0.9}):
        assert_same_sample(logits, num_samples=2, noise=noise, **filters)


def check_rows_beyond_repair():
    logits = torch.zeros(3, 300, device=DEVICE)
    logits[0, 7], logits[1, 7], logits[2] = torch.nan, torch.inf, -torch.inf
    assert_same_sample(logits, num_samples=40)
    assert_same_sample(logits, num_samples=4, top_k=5, top_p=0.5)


@pytest.mark.parametrize("case", range(11))
def check_kept_set_equals_llamagen(case):
    """Noise lifts one column at a time, those around the edge of the kept set: it is drawn exactly if it is kept."""
    parity = torch.load(PARITY, weights_only=True)
    top_k, top_p, temperature = parity[f"case{case:02d}_params"].tolist()
    rows = slice(5, 7)  # the rows before hold ties, whose order in the file is arbitrary at the edge of top-p
    logits, keep = parity["logits"][rows], parity[f"case{case:02d}_keep"][rows]
    order = logits.argsort(dim=1, descending=True)
    ranks = (keep.sum(1, keepdim=True) + torch.arange(-3, 3)).clamp(0, logits.shape[1] - 1)
    probes = order.gather(1, ranks)
    noise = torch.zeros(*probes.shape, logits.shape[1]).scatter_(2, probes[..., None], 1e9)
    filters = {"top_k": int(top_k), "top_p": top_p, "temperature": temperature}
    sample = sample_tokens(logits.to(DEVICE), num_samples=6, noise=noise.to(DEVICE), seed=0, impl="triton", **filters)
    assert torch.equal(sample.tokens.cpu() == probes, keep.gather(1, probes))
    probs = (logits.double() / temperature).softmax(1)
    torch.testing.assert_close(sample.kept_mass.cpu().double(), (probs * keep).sum(1), atol=1e-6, rtol=1e-6)


def check_any_split_and_order_of_the_batch_draws_the_same():
    logits = hard_rows(300)
    row_ids = torch.arange(6, device=DEVICE) * 7

    def draw(rows):
        return sample_tokens(logits[rows], num_samples=3, top_k=9, seed=1, row_ids=row_ids[rows], impl="triton")

    whole = draw(slice(None))
    for rows in (slice(0, 2), slice(2, 6), [5, 0, 3, 1, 4, 2]):
        for part, expected in zip(draw(rows), whole, strict=True):
            assert torch.equal(part, expected[rows])
