"""The masks of dropout: their share, their independence, and what they do not depend on."""

import math

import pytest
import torch

from grpo.kernels import Dropout, drop_features

IDS = torch.tensor([0, 1, 7, 2**32 + 1, -1])


def kept(rate=0.5, *, shape=(5, 40, 64), **keys):
    """Which features are kept [R, S, D]."""
    return drop_features(torch.ones(shape), rate, **{"row_ids": IDS, "seed": 3, **keys}) != 0


def layer(number):
    return torch.tensor(number)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_stated_share_is_dropped_and_the_rest_scaled_up(rate):
    x = torch.randn(5, 40, 64, dtype=torch.float64)
    out = drop_features(x, rate, row_ids=IDS, seed=3)
    dropped = out == 0
    deviation = 5 * math.sqrt(rate * (1 - rate) / x.numel())  # five standard deviations
    assert dropped.double().mean().item() == pytest.approx(rate, abs=deviation)
    torch.testing.assert_close(out[~dropped], (x / (1 - rate) if rate < 1 else x)[~dropped])


# What sets each apart from the mask of layer 0, place 0, seed 3 and the row ids above; and pairs inside one mask.
OTHERS = {
    "layer": lambda: kept(layer=layer(1)),
    "far layer": lambda: kept(layer=layer(47)),
    "place": lambda: kept(place=1),
    "seed": lambda: kept(seed=4),
    "high word of the seed": lambda: kept(seed=3 + 2**32),
    "row": lambda: kept(row_ids=IDS + 1000),
    "high word of the row": lambda: kept(row_ids=IDS + 2**40),
    "neighbouring row": lambda: kept().roll(1, 0),
    "neighbouring position": lambda: kept().roll(1, 1),
    "neighbouring feature": lambda: kept().roll(1, 2),
    "feature of the next word": lambda: kept().roll(16, 2),
}


@pytest.mark.parametrize("other", OTHERS)
def test_masks_of_different_keys_are_independent(other):
    """Chi-square of the fourfold table, one degree of freedom: above 15 once in 10,000 independent pairs."""
    first, second = kept().flatten().double(), OTHERS[other]().flatten().double()
    n, correlation = len(first), torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    assert n * correlation**2 < 15


def test_chi_square_of_sixteen_features_by_their_patterns():
    """Four features of four words each fall into 16 equally likely patterns."""
    bits = kept()[..., ::16].flatten(0, 1).long()  # [200, 4]: the first group's four words
    counts = torch.bincount((bits * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16).double()
    expected = counts.sum() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # 15 degrees of freedom, once in 10,000


def test_a_mask_depends_on_its_row_only():
    whole = kept(shape=(5, 40, 30))  # not a multiple of four: the last words of a position are cut
    assert torch.equal(kept(row_ids=IDS[[3, 0]], shape=(2, 40, 30)), whole[[3, 0]])
    assert torch.equal(kept(shape=(5, 7, 30)), whole[:, :7])


def test_the_gradient_has_the_same_mask():
    x = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: drop_features(x, 0.4, row_ids=IDS, seed=1, place=2), x)


def test_half_precision_is_that_of_fp32_rounded():
    x = torch.randn(5, 4, 8).bfloat16()
    out = drop_features(x, 0.1, row_ids=IDS, seed=0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, drop_features(x.float(), 0.1, row_ids=IDS, seed=0).bfloat16())


def test_the_op_is_well_formed():
    x = torch.randn(5, 3, 8, requires_grad=True)
    arguments = (x, IDS, layer(2), 1, 0, 0.3, "auto")
    torch.library.opcheck(torch.ops.grpo.dropout, arguments)


def test_rows_are_dropped_whole_by_their_numbers():
    ids = torch.arange(4000)
    rows = Dropout(ids, seed=1).rows(0.1, place=0)
    assert rows.double().mean().item() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 4000))
    assert torch.equal(Dropout(ids[1000:], seed=1).rows(0.1, place=0), rows[1000:])
    assert Dropout(ids).rows(1.0, place=0).all()
    assert not Dropout(ids).rows(0.0, place=0).any()


def test_layers_and_copies():
    masks, x = Dropout(IDS, seed=3), torch.ones(5, 4, 8)
    for number, of_block in enumerate(masks.layers(3), start=1):
        expected = drop_features(x, 0.5, row_ids=IDS, seed=3, layer=layer(number), place=1)
        assert torch.equal(of_block(x, 0.5, place=1), expected)
    assert torch.equal(masks.repeat(2)(x.repeat(2, 1, 1), 0.5, place=0), masks(x, 0.5, place=0).repeat(2, 1, 1))
    assert masks(x, 0.0, place=0) is x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.1}, "rate is 1.1"),
        ({"rate": -0.1}, "rate is -0.1"),
        ({"place": 256}, "place is 256"),
        ({"row_ids": IDS[:3]}, "expected x"),
        ({"row_ids": IDS.int()}, "expected x"),
    ],
)
def test_mistakes_are_refused(changes, message):
    arguments = {"rate": 0.1, "row_ids": IDS, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message):
        drop_features(torch.ones(5, 2, 4), **arguments)
