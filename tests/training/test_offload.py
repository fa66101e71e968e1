import pytest
import torch
from torch import nn

from grpo.checkpoint.state import training_tensors
from grpo.config import Optimizer
from grpo.training.offload import OffloadedAdamW
from grpo.training.optimizer import build_optimizer


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def take_steps(model, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=generator)).square().sum().backward()
        if step % 2:
            model[1].bias.grad = None  # a parameter may be without gradient
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_adamw_bit_for_bit(weight_decay):
    models = [make_model(), make_model()]
    for model, offload in zip(models, (False, True), strict=True):
        config = Optimizer(lr=1e-2, weight_decay=weight_decay, cpu_offload=offload)
        optimizer = build_optimizer(model, config)
        assert isinstance(optimizer, OffloadedAdamW) == offload
        assert len(optimizer.param_groups) == 2
        take_steps(model, optimizer, 0, 5)
    for plain, offloaded in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(plain, offloaded)


def test_moments_stay_where_they_are_on_the_host():
    model = make_model()
    optimizer = build_optimizer(model, Optimizer(cpu_offload=True))
    take_steps(model, optimizer, 0, 1)
    before = {key: state["exp_avg"].data_ptr() for key, state in optimizer.state.items()}
    values = [state["exp_avg"].clone() for state in optimizer.state.values()]
    take_steps(model, optimizer, 1, 3)
    assert {key: state["exp_avg"].data_ptr() for key, state in optimizer.state.items()} == before
    assert not any(torch.equal(a, s["exp_avg"]) for a, s in zip(values, optimizer.state.values(), strict=True))
    assert all(state["exp_avg"].device.type == "cpu" for state in optimizer.state.values())


def test_state_is_saved_and_loaded_like_that_of_adamw():
    whole, broken = make_model(), make_model()
    config = Optimizer(lr=1e-2, cpu_offload=True)
    optimizer = build_optimizer(whole, config)
    take_steps(whole, optimizer, 0, 4)

    first = build_optimizer(broken, config)
    take_steps(broken, first, 0, 2)
    second = build_optimizer(broken, config)
    second.load_state_dict(first.state_dict())
    take_steps(broken, second, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))
    model = make_model()
    plain = training_tensors(model, build_optimizer(model, Optimizer()))
    assert training_tensors(broken, second)["optimizer"].keys() == plain["optimizer"].keys()
