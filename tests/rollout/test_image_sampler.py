"""What is said about the images that a sampler has drawn."""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from grpo.config import Sampling
from grpo.models import ClassCondition
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


def test_llamagen_resizes_without_antialiasing_what_is_not_yet_clamped(model):
    decoded = 3 * torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    decoder = SimpleNamespace(decode=lambda tokens: decoded)

    def drawn(**settings):
        sampler = ImageSampler(model, decoder, Sampling(**settings), device=torch.device("cpu"))
        return sampler(ClassCondition(torch.zeros(2, dtype=torch.int64)), torch.arange(2))

    theirs = (127.5 * F.interpolate(decoded, size=(8, 8), mode="bicubic") + 128).clamp(0, 255).to(torch.uint8)
    ours = drawn(resize_to=8, resize_filter="bicubic").int()
    assert (ours - theirs.int()).abs().max() <= 1  # where a value lies halfway
    assert (ours != theirs.int()).float().mean() < 0.01
    assert (drawn(resize_to=8).int() - ours).abs().max() > 20
    assert drawn().shape == (2, 3, 12, 12)
