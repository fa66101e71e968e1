"""The optimizer: decay, schedule, clipping, and what happens to non-finite gradients."""

import math

import pytest
import torch
from torch import nn

from grpo.config import Optimizer
from grpo.training import GuardedOptimizer, learning_rate


def make_optimizer(model, **settings):
    return GuardedOptimizer(model, Optimizer(**settings), total_steps=10, max_skipped_steps=2)


def test_norms_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = make_optimizer(model, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_a_step_clips_and_reports_the_norm_before():
    model = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.0, max_grad_norm=0.5)
    before = model.weight.item()
    optimizer.backward(3.0 * model.weight.sum())
    taken = optimizer.step()
    assert taken["grad_norm"] == pytest.approx(3.0)
    assert taken["lr"] == 0.1
    assert model.weight.item() == pytest.approx(before - 0.1, abs=1e-6)  # Adam's first step has length lr
    assert model.weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_are_skipped_and_counted(bad):
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, lr=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    for count in (1, 2):
        optimizer.backward(bad * model.weight.sum())
        assert optimizer.step()["skipped_steps"] == count
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert optimizer.stuck
    optimizer.backward(model.weight.sum())
    optimizer.step()  # a good step in between starts the count anew
    assert not optimizer.stuck
    assert optimizer.skipped == 2


def test_counters_survive_a_resume():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    optimizer.backward(model.weight.sum())
    optimizer.step()
    again = make_optimizer(model)
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict() == optimizer.state_dict()


def test_schedules_by_hand():
    constant = Optimizer(lr=1.0, warmup_steps=3)
    assert [learning_rate(constant, step=s, total_steps=10) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = Optimizer(lr=1.0, schedule="cosine")
    rates = [learning_rate(cosine, step=s, total_steps=4) for s in range(5)]
    assert rates == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0])
    cycle = [learning_rate(Optimizer(lr=2.0, schedule="one_cycle"), step=s, total_steps=100) for s in range(101)]
    assert max(cycle) == pytest.approx(2.0)
    assert cycle.index(max(cycle)) == 30
    assert cycle[0] < 0.1
    assert cycle[100] == pytest.approx(0.0)
