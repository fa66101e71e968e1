"""Sums that add up to means, whoever has added them."""

import pytest
import torch

from grpo.parallel import MetricSums


def test_merged_sums_are_as_if_added_to_one():
    parts, whole = (MetricSums(), MetricSums()), MetricSums()
    for part, values in zip(parts, ([1.0, 2.0], [6.0]), strict=True):
        for sums in (part, whole):
            sums.add_values("reward", torch.tensor(values))
            sums.add("loss", torch.tensor(sum(values)), len(values))
    parts[1].add("only", 3.0)
    whole.add("only", 3.0)
    parts[0].merge(parts[1])
    means = parts[0].means()
    assert means == whole.means()
    assert (means["loss"], means["only"], means["reward_mean"]) == (3.0, 3.0, 3.0)
    assert means["reward_std"] == pytest.approx((14 / 3) ** 0.5)
    assert parts[0].means() == {}
    assert parts[1].means()["loss"] == 6.0  # what was merged is not taken away
