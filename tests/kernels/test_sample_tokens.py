"""The torch reference of `sample_tokens`: filter, draws, determinism, refusals."""

from pathlib import Path

import pytest
import torch

from grpo.kernels import sample_tokens
from grpo.kernels.philox import philox

PARITY = Path(__file__).parents[1] / "fixtures/llamagen/sampling_filter.pt"
ROWS_WITH_TIES = 5


def kept_columns(logits, **filters):
    """The kept set, seen from outside: noise that lifts one column above all draws it exactly if it is kept."""
    V = logits.shape[1]
    noise = 1e9 * torch.eye(V).expand(logits.shape[0], V, V)
    sample = sample_tokens(logits, num_samples=V, noise=noise, seed=0, **filters)
    return sample.tokens == torch.arange(V), sample


@pytest.mark.parametrize("case", range(11))
def test_filter_equals_llamagen(case):
    parity = torch.load(PARITY, weights_only=True)
    top_k, top_p, temperature = parity[f"case{case:02d}_params"].tolist()
    expected, log_probs = parity[f"case{case:02d}_keep"], parity[f"case{case:02d}_log_probs"]
    logits = parity["logits"]
    kept, sample = kept_columns(logits, top_k=int(top_k), top_p=top_p, temperature=temperature)
    # Which of several equal values stays at the edge of top-p is arbitrary in the file: there only their number counts.
    assert torch.equal(kept[ROWS_WITH_TIES:], expected[ROWS_WITH_TIES:])
    assert torch.equal(kept.sum(1), expected.sum(1))
    probs = (logits.double() / temperature).softmax(1)
    torch.testing.assert_close(sample.kept_mass.double(), (probs * expected).sum(1), atol=1e-6, rtol=1e-6)
    both = kept & expected
    torch.testing.assert_close(sample.kept_log_probs[both], log_probs[both], atol=2e-5, rtol=1e-5)


def test_edges_of_the_filter():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0, -0.0, 0.0, -1.0]])

    def kept(**filters):
        return kept_columns(logits, **filters)[0][0].nonzero().flatten().tolist()

    assert kept(top_k=1) == [1, 2, 4]
    assert kept(top_k=5) == [0, 1, 2, 3, 4, 5, 6]
    assert kept(top_k=8) == kept(top_k=100) == kept(top_k=0) == kept(top_k=-1) == list(range(8))
    assert kept(top_p=0.0) == kept(top_p=1e-6) == [1]
    assert kept(top_p=1.0) == kept(top_p=2.0) == list(range(8))
    assert kept(top_k=1, top_p=0.5) == [1, 2]
    one_hot = torch.full((1, 8), -torch.inf)
    one_hot[0, 3] = 5.0
    for filters in ({}, {"top_k": 3}, {"top_p": 0.999}):
        assert sample_tokens(one_hot, num_samples=9, seed=1, **filters).tokens.eq(3).all()


def test_a_distribution_beyond_repair_is_flagged_and_drawn_within_bounds():
    logits = torch.zeros(4, 300)
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    sample = sample_tokens(logits, num_samples=50, seed=0)
    assert sample.log_probs[:3].isnan().all()
    assert sample.kept_mass[:3].isnan().all()
    assert not sample.tokens[:2].eq(7).any()
    assert sample.tokens[2].eq(0).all()
    torch.testing.assert_close(sample.log_probs[3], torch.full((50,), -torch.tensor(300.0).log().item()))


def chi_square_excess(observed, expected):
    """Standard deviations by which the chi-square statistic of counts exceeds its mean."""
    assert expected.min() > 5
    freedom = observed.numel() - 1
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


def test_draws_follow_the_distribution():
    V, rows, samples = 150, 500, 2000
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0)).mul(1.5)
    tokens = sample_tokens(logits.expand(rows, V), num_samples=samples, seed=11, temperature=1.3).tokens
    probs = (logits[0].double() / 1.3).softmax(0)
    assert chi_square_excess(tokens.flatten().bincount(minlength=V), probs * tokens.numel()) < 4

    # Pairs of samples of one row, and of one sample's neighbouring rows, are independent.
    bins = (probs.cumsum(0) * 8).long().clamp(max=7)
    masses = torch.zeros(8, dtype=torch.double).index_add_(0, bins, probs)
    expected = torch.outer(masses, masses).flatten() * tokens.numel() / 2
    for first, second in ((tokens[:, ::2], tokens[:, 1::2]), (tokens[::2], tokens[1::2])):
        pairs = (bins[first] * 8 + bins[second]).flatten().bincount(minlength=64)
        assert chi_square_excess(pairs, expected) < 4


def test_truncated_draws_follow_the_renormalised_distribution():
    V = 300
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    sample = sample_tokens(logits.expand(200, V), num_samples=500, seed=5, top_k=100, top_p=0.8)
    kept, _ = kept_columns(logits, top_k=100, top_p=0.8)
    probs = logits[0].double().softmax(0)[kept[0]]
    counts = sample.tokens.flatten().bincount(minlength=V)
    assert counts[~kept[0]].sum() == 0
    assert chi_square_excess(counts[kept[0]], probs / probs.sum() * 100_000) < 4
    torch.testing.assert_close(sample.kept_log_probs, sample.log_probs - sample.kept_mass.log()[:, None])


def test_draws_depend_on_seed_step_row_and_sample_alone():
    logits = torch.randn(40, 700, generator=torch.Generator().manual_seed(2))
    row_ids = torch.arange(40) * 3 + 2**40

    def draw(rows, **changes):
        arguments = {"seed": 3, "step": 4, "num_samples": 6, "top_p": 0.9, **changes}
        return sample_tokens(logits[rows], row_ids=row_ids[rows], **arguments)

    whole = draw(slice(None))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for rows in (slice(0, 17), slice(17, 40), order):
        for part, expected in zip(draw(rows), whole, strict=True):
            assert torch.equal(part, expected[rows])
    assert torch.equal(draw(slice(None), num_samples=2).tokens, whole.tokens[:, :2])
    assert torch.equal(draw(slice(None), seed=torch.tensor(3), step=torch.tensor(4)).tokens, whole.tokens)
    assert torch.equal(draw(slice(None), seed=-1).tokens, draw(slice(None), seed=2**64 - 1).tokens)
    for change in ({"seed": 4}, {"seed": 3 + 2**32}, {"step": 5}):
        assert (draw(slice(None), **change).tokens != whole.tokens).float().mean() > 0.9
    assert (sample_tokens(logits, seed=3, step=4, num_samples=6).tokens != whole.tokens).float().mean() > 0.9


def test_philox_known_answers():
    """The test vectors that come with Random123."""
    ones = 0xFFFFFFFF
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    for (counter, key), expected in {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((ones,) * 4, (ones,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        pi: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }.items():
        words = tuple(torch.tensor([word]) for word in counter)
        assert tuple(word.item() for word in philox(words, key)) == expected
        assert tuple(word.item() for word in philox(tuple(word.numpy() for word in words), key)) == expected


def test_is_an_op():
    logits = torch.randn(3, 200)
    arguments = (logits, torch.tensor(1), torch.tensor(2), torch.arange(3), None, 4, 0.9, 20, 0.8, "auto")
    torch.library.opcheck(torch.ops.grpo.sample_tokens.default, arguments)

    def draw(x):
        return sample_tokens(x, num_samples=3, seed=1, top_p=0.7)

    for compiled, eager in zip(
        torch.compile(draw, fullgraph=True, backend="aot_eager")(logits), draw(logits), strict=True
    ):
        assert torch.equal(compiled, eager)
    assert not draw(logits.requires_grad_()).log_probs.requires_grad


def test_refusals():
    logits = torch.zeros(2, 5)
    for message, changes in {
        "num_samples is 0": {"num_samples": 0},
        "temperature is 0": {"temperature": 0},
        "temperature is nan": {"temperature": float("nan")},
        "seed is 1.5; it must be an integer": {"seed": 1.5},
        "seed must be an integer or a 0-dim int64 tensor": {"seed": torch.tensor([1])},
        "top_p is -1": {"top_p": -1},
        "row_ids must be": {"row_ids": torch.zeros(3, dtype=torch.int64)},
        "noise must be": {"noise": torch.zeros(2, 5)},
        "impl is 'fast'": {"impl": "fast"},
        "logits must be": {"logits": torch.zeros(5)},
        "not on a GPU": {"impl": "triton"},
    }.items():
        with pytest.raises(ValueError, match=message):
            sample_tokens(**{"logits": logits, "seed": 0, **changes})
