"""The moving average of a model's weights; its shards on two ranks are checked in tests/parallel/two_ranks.py."""

import pytest
import torch
from torch import nn

from grpo.config import Optimizer
from grpo.training import GuardedOptimizer, MovingAverage


def test_the_average_follows_the_formula_and_skips_what_the_optimizer_skips():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = MovingAverage(model, 0.9)
    optimizer = GuardedOptimizer(model, Optimizer(lr=0.1), total_steps=9, max_skipped_steps=2, average=average)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for factor in (1.0, float("nan"), 3.0):
        optimizer.backward(factor * model(torch.ones(1, 3)).square().sum())
        optimizer.step()
        if factor == factor:
            weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
            expected = {name: 0.9 * expected[name] + 0.1 * weights[name] for name in weights}
    assert average.state_tensors().keys() == expected.keys()
    for name, tensor in average.state_tensors().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shared", [False, True])
def test_swapped_gives_the_model_the_average_and_takes_it_back(shared):
    """Also where the average is the weights of another model, which start as this one's."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    average = MovingAverage(model, 0.5, into=other if shared else None)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(2.0)
    average.update()
    with average.swapped():
        torch.testing.assert_close(model.weight, start + 1)
    torch.testing.assert_close(model.weight, start + 2)
    torch.testing.assert_close(average.state_tensors()["weight"], start + 1)
    if shared:
        torch.testing.assert_close(other.weight, start + 1)
        assert not other.weight.requires_grad
