"""Advantages against hand-computed cases and the reference's numbers."""

import math
from typing import get_args

import pytest
import torch

from grpo.config import Objective
from grpo.config.types import AdvantageKind
from grpo.objectives import combined_advantages, credit, group_advantages, spreadless_groups
from grpo.rewards import Rewarded, Term


def rewarded(total, components=None, weights=(1.0,)):
    """Rewards [R, M] as `credit` gets them; of one kind unless components say more."""
    components = total[None] if components is None else components
    return Rewarded(total, components, {str(i): Term(None, weight) for i, weight in enumerate(weights)}, torch.empty(0))


REWARDS = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])


def test_group_std_by_hand():
    """Mean 3, deviations -2 -1 0 3, unbiased variance 14/3."""
    std = math.sqrt(14 / 3)
    expected = torch.tensor([[-2 / std, -1 / std, 0.0, 3 / std], [0.0] * 4])
    torch.testing.assert_close(group_advantages(REWARDS), expected)


def test_group_mean_and_leave_one_out_by_hand():
    torch.testing.assert_close(group_advantages(REWARDS, kind="group_mean")[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]))
    left_out = torch.tensor([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3])
    torch.testing.assert_close(group_advantages(REWARDS, kind="leave_one_out")[0], left_out)


def test_batch_std_divides_by_the_spread_of_all_rewards():
    advantages = group_advantages(REWARDS, kind="batch_std")
    torch.testing.assert_close(advantages[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / REWARDS.std())
    assert torch.equal(advantages[1], torch.zeros(4))


def test_gdpo_normalises_each_reward_by_itself():
    small, large = torch.tensor([[0.0, 0.1, 0.2]]), torch.tensor([[300.0, 100.0, 200.0]])
    advantages = group_advantages(
        small + 2 * large, kind="gdpo", components=torch.stack([small, large]), component_weights=[1.0, 2.0]
    )
    torch.testing.assert_close(advantages, torch.tensor([[-1.0 + 2.0, 0.0 - 2.0, 1.0 + 0.0]]))


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out", "batch_std"])
@pytest.mark.parametrize("value", [0.1, -1e-3, 1234.567, 0.0])
def test_groups_that_differ_by_rounding_only_get_exactly_zero(kind, value):
    """Equal completions whose rewards were rounded differently, as by another batch split of the decoder."""
    generator = torch.Generator().manual_seed(0)
    jitter = torch.randint(-2, 3, (64, 8), generator=generator) * torch.finfo(torch.float32).eps
    rewards = torch.full((64, 8), value) * (1 + jitter)
    assert torch.equal(group_advantages(rewards, kind=kind), torch.zeros(64, 8))
    assert spreadless_groups(rewards).all()


def test_a_small_real_spread_is_kept():
    rewards = torch.tensor([[1.0, 1.0001]])
    torch.testing.assert_close(group_advantages(rewards), torch.tensor([[-(0.5**0.5), 0.5**0.5]]), rtol=2e-3, atol=0)
    assert not spreadless_groups(rewards).any()


def test_clip_and_non_finite_rewards():
    assert group_advantages(REWARDS, clip=1.0).abs().max() == 1.0
    for kind in ("group_std", "group_mean", "leave_one_out", "batch_std"):
        assert not group_advantages(torch.tensor([[1.0, math.inf, 2.0]]), kind=kind).isfinite().any()


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(4, 1))
    with pytest.raises(ValueError, match="unknown advantage"):
        group_advantages(REWARDS, kind="median")
    with pytest.raises(ValueError, match="gdpo"):
        group_advantages(REWARDS, kind="gdpo")


@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
@pytest.mark.parametrize("kind", ["group_std", "gdpo"])
def test_credit_is_that_of_the_groups_in_both_modes(shape, kind):
    """Groups of 4 completions of one context, or of 4 contexts with one completion each."""
    components = torch.stack([REWARDS, torch.rand(2, 4, generator=torch.Generator().manual_seed(0))])
    weights = [1.0, 3.0]
    total = components[0] + 3 * components[1]
    objective = Objective(advantage=kind, advantage_clip=1.0)
    advantages, metrics = credit(
        rewarded(total.view(shape), components.view(2, *shape), weights), group_size=4, objective=objective
    )
    expected = group_advantages(total, kind=kind, clip=1.0, components=components, component_weights=weights)
    torch.testing.assert_close(advantages, expected.view(shape))
    assert metrics.means() == {"zero_spread": 0, "group_std": pytest.approx(total.std(dim=1).mean().item())}


def test_credit_counts_groups_that_teach_nothing():
    advantages, metrics = credit(rewarded(REWARDS), group_size=4, objective=Objective(advantage="leave_one_out"))
    assert metrics.means()["zero_spread"] == 0.5
    assert torch.equal(advantages, group_advantages(REWARDS, kind="leave_one_out", clip=5.0))
    _, alone = credit(rewarded(REWARDS.view(8, 1)), group_size=1, objective=Objective(advantage="batch_std"))
    assert alone.means() == {"zero_spread": 0}


NAN = math.nan
SHY = torch.tensor([[1.0, NAN, 3.0, 8.0], [NAN, NAN, 2.0, NAN], [NAN] * 4, [4.0, 6.0, NAN, NAN]], dtype=torch.float64)
"""Deviations of those with an opinion: -3, -1, 4; one opinion; none; -1, 1."""


@pytest.mark.parametrize(
    ("kind", "scales"),
    [
        ("group_std", (13**-0.5, 2**-0.5)),  # variances 26 / 2 and 2 / 1
        ("group_mean", (1.0, 1.0)),
        ("leave_one_out", (3 / 2, 2 / 1)),
        ("batch_std", (6.8**-0.5,) * 2),  # all opinions 1 3 8 2 4 6: mean 4, squares 9 1 16 4 0 4 over 5
    ],
)
def test_who_abstains_is_in_no_mean_and_in_no_spread(kind, scales):
    first, second = scales
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[0] = torch.tensor([-3.0, 0.0, -1.0, 4.0]) * first
    expected[3] = torch.tensor([-1.0, 1.0, 0.0, 0.0]) * second
    torch.testing.assert_close(group_advantages(SHY, kind=kind), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(combined_advantages(SHY[None], [Term(None)], kind=kind), expected.float())


def test_who_abstains_adds_nothing_to_the_sum():
    """Group 1: 1 2 3 4 plus twice the deviations -3 0 -1 4. Group 3: only the first reward has opinions."""
    sure = torch.tensor([[1.0, 2.0, 3.0, 4.0], [NAN] * 4, [2.0, 2.0, 2.0, 6.0], [0.0, NAN, NAN, 0.0]])
    how = [Term(None), Term(None, weight=2.0)]
    both = torch.stack([sure.double(), SHY])
    expected = torch.tensor(
        [[-1.5 - 6, -0.5, 0.5 - 2, 1.5 + 8], [0.0] * 4, [-1.0, -1.0, -1.0, 3.0], [-2.0, 2.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(combined_advantages(both, how, kind="group_mean"), expected)
    by_std = combined_advantages(both, how, kind="group_std")
    torch.testing.assert_close(by_std[0], expected[0] / expected[0].std())
    torch.testing.assert_close(by_std[3], torch.tensor([-1.0, 1.0, 0.0, 0.0]))  # of 3 in the sum
    torch.testing.assert_close(
        combined_advantages(both, how, kind="gdpo")[0],
        torch.tensor([-1.5, -0.5, 0.5, 1.5]) / (5 / 3) ** 0.5 + 2 * torch.tensor([-3.0, 0.0, -1.0, 4.0]) / 13**0.5,
    )


SMALL, LARGE = torch.tensor([[[0.0, 0.1, 0.2], [0.3, 0.1, 0.2]], [[300.0, 100.0, 200.0], [0.0, 900.0, 900.0]]])


def test_rewards_are_normalised_before_their_weights():
    """Within the group -1 0 1 and 1 -1 0; over the batch the large one has mean 400 and variance 160,000."""
    group = torch.tensor([[-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
    batch = (LARGE - 400) / 400
    how = [Term(None, 1.0, normalise="group"), Term(None, 3.0, normalise="batch")]
    total = group + 3 * batch
    expected = total - total.mean(dim=1, keepdim=True)
    torch.testing.assert_close(combined_advantages(torch.stack([SMALL, LARGE]), how, kind="group_mean"), expected)


@pytest.mark.parametrize(("normalise", "kind"), [("none", "leave_one_out"), ("group", "group_mean"), ("batch", "gdpo")])
def test_a_separate_reward_has_an_advantage_of_its_own(normalise, kind):
    own = {
        "none": group_advantages(LARGE, kind=kind) if kind != "gdpo" else None,
        "group": group_advantages(LARGE, kind="group_std"),
        "batch": (LARGE - 400) / 400,
    }[normalise]
    others = group_advantages(SMALL, kind="group_std" if kind == "gdpo" else kind)
    how = [Term(None), Term(None, 2.0, normalise, separate=True)]
    found = combined_advantages(torch.stack([SMALL, LARGE]), how, kind=kind)
    torch.testing.assert_close(found, others + 2 * own)
    alone = combined_advantages(LARGE[None], how[1:], kind=kind, clip=1.0)
    torch.testing.assert_close(alone, (2 * own).clamp(-1, 1))


def test_a_fault_is_not_taken_for_an_opinion_that_is_missing():
    components = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [[NAN, math.inf, NAN], [1.0, NAN, 0.0]]])
    for normalise in ("none", "group"):
        for separate in (False, True):
            how = [Term(None), Term(None, 1.0, normalise, separate)]
            advantages = combined_advantages(components, how)
            assert not advantages[0].isfinite().all()
            assert advantages[1].isfinite().all()


@pytest.mark.parametrize("kind", get_args(AdvantageKind))
def test_every_kind_that_a_recipe_may_ask_for_is_there(kind):
    advantages, _ = credit(rewarded(REWARDS), group_size=4, objective=Objective(advantage=kind))
    assert advantages[0].argmax() == 3
    assert torch.equal(advantages[1], torch.zeros(4))
