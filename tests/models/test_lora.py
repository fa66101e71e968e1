"""Adapters of a generator: what they compute, and what is merged."""

import pytest
import torch
from torch.testing import assert_close

from grpo.config import Lora, Model, UserError
from grpo.formats import Adapter, merged
from grpo.models import GPT, ClassCondition, GPTConfig, WithoutAdapter, adapter_matrices, add_adapter, mark_trained
from grpo.models.fused_gpt import FusedGPT
from grpo.models.lora import LoraLinear

CONFIG = GPTConfig(dim=16, n_layer=2, n_head=2, vocab_size=20, block_size=9, num_classes=3, multiple_of=8)
ALL = ("wqkv", "wo", "w1", "w2", "w3")
TOKENS, CONDITION = torch.arange(16).view(2, 8) % 20, ClassCondition(torch.tensor([0, 2]))


def model(*, targets=ALL, rank=3, alpha=6.0):
    """With an adapter that does something."""
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    torch.nn.init.normal_(gpt.output.weight)
    add_adapter(gpt, Adapter(rank=rank, alpha=alpha, targets=targets))
    for module in gpt.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.lora_B.weight, std=0.5)
    return gpt


def plain_copy(adapted, *, with_adapter):
    """An ordinary GPT of the same weights, with the adapter multiplied out or left out."""
    weights, matrices = adapted.state_dict(), adapter_matrices(adapted.state_dict())
    base = {name: weight for name, weight in weights.items() if name not in matrices}
    gpt = GPT(CONFIG)
    gpt.load_state_dict(merged(base, adapted.adapter, matrices) if with_adapter else base)
    return gpt


def test_a_layer_by_hand():
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.data[:] = torch.tensor([[1.0, 2.0]])
    layer = LoraLinear(linear, Adapter(rank=1, alpha=3.0, targets=("w1",)))
    x = torch.tensor([[1.0, 1.0]])
    assert layer(x).item() == 3.0  # B starts at 0
    layer.lora_A.weight.data[:], layer.lora_B.weight.data[:] = torch.tensor([[1.0, -2.0]]), 5.0
    assert layer(x).item() == 3.0 + 3.0 * 5.0 * (1 - 2)


@pytest.mark.parametrize("targets", [ALL, ("wqkv", "w2")])
def test_it_computes_as_the_merged_weights_and_without_it_as_the_base(targets):
    adapted = model(targets=targets)
    whole, base = (plain_copy(adapted, with_adapter=kept) for kept in (True, False))
    hidden = adapted.hidden(TOKENS, CONDITION)
    assert_close(hidden, whole.hidden(TOKENS, CONDITION), rtol=1e-4, atol=1e-5)
    assert (hidden - base.hidden(TOKENS, CONDITION)).abs().max() > 0.1
    frozen = WithoutAdapter(adapted)
    assert torch.equal(frozen.hidden(TOKENS, CONDITION), base.hidden(TOKENS, CONDITION))
    assert torch.equal(adapted.hidden(TOKENS, CONDITION), hidden)  # it is on again


def test_only_the_adapter_has_a_gradient():
    adapted = model()
    adapted(TOKENS, CONDITION).square().mean().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == set(adapter_matrices(adapted.state_dict()))
    assert len(trained) == 2 * 2 * len(ALL)


@pytest.mark.parametrize("copies", [True, False])
def test_the_fused_forward_has_the_merged_weights_of_now(copies):
    adapted = model()
    fused = FusedGPT(adapted, copies=copies, impl="reference")
    for _ in range(2):
        whole = plain_copy(adapted, with_adapter=True)
        expected = [whole.state_dict()[f"layers.1.attention.{name}.weight"] for name in ("wqkv", "wo")]
        assert_close([fused.blocks[1].wqkv, fused.blocks[1].wo], expected)
        for module in adapted.modules():
            if isinstance(module, LoraLinear):
                module.lora_B.weight.data.mul_(2)
        fused.refresh()


def test_the_recipe_says_what_is_trained():
    gpt = mark_trained(GPT(CONFIG), Model(checkpoint="base.pt"), Lora(rank=2, targets=["wo"]))
    assert gpt.adapter == Adapter(rank=2, alpha=4.0, targets=("wo",), base="base.pt")
    assert gpt.adapter.scale == 2
    assert all(parameter.requires_grad for parameter in mark_trained(GPT(CONFIG), Model(), Lora()).parameters())


def test_layers_that_are_not_there():
    with pytest.raises(UserError, match=r"lora.targets: .* no linear layers q_proj; they have \['wqkv', 'wo', 'w1'"):
        add_adapter(GPT(CONFIG), Adapter(rank=2, alpha=4.0, targets=("wo", "q_proj")))
