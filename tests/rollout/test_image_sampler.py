"""What is said about the images that a sampler has drawn."""

import torch

from grpo.config import Sampling
from grpo.parallel import metric_sums
from grpo.rollout import ImageSampler


def test_entropy_on_a_rank_that_drew_nothing(model, monkeypatch):
    """The mean is over all ranks, and every rank must bring the same names to it."""
    of_another_rank = {"entropy:sum": 30.0, "entropy:count": 20.0}

    def all_reduce_sums(sums):
        assert sums.keys() == of_another_rank.keys()
        return {name: float(value) + of_another_rank[name] for name, value in sums.items()}

    monkeypatch.setattr(metric_sums, "all_reduce_sums", all_reduce_sums)
    sampler = ImageSampler(model, None, Sampling(), device=torch.device("cpu"))
    assert sampler.entropy() == 1.5
