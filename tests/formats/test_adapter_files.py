"""LoRA adapters in PEFT's layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from grpo.config import UserError
from grpo.formats import Adapter, merged, read_adapter, save_adapter

ADAPTER = Adapter(rank=2, alpha=8.0, targets=("w1", "wo"), base="base.pt")
SHAPES = {"layers.0.wo": (3, 5), "layers.0.w1": (4, 3)}


def matrices():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (outputs, inputs) in SHAPES.items():
        found[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        found[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    return found


def test_written_and_read_back(tmp_path):
    save_adapter(tmp_path, ADAPTER, matrices())
    adapter, tensors = read_adapter(tmp_path)
    assert adapter == ADAPTER
    assert_close(tensors, matrices(), rtol=0, atol=0)
    assert "base_model.model.layers.0.wo.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_merged_by_hand(tmp_path):
    weights = {f"{name}.weight": torch.ones(shape) for name, shape in SHAPES.items()} | {"norm.weight": torch.ones(3)}
    result, parts = merged(weights, ADAPTER, matrices()), matrices()
    product = 4 * parts["layers.0.wo.lora_B.weight"] @ parts["layers.0.wo.lora_A.weight"]
    assert_close(result["layers.0.wo.weight"], 1 + product)
    assert_close(result["norm.weight"], weights["norm.weight"])
    assert weights["layers.0.wo.weight"].eq(1).all()
    stabilized = Adapter(rank=4, alpha=8.0, targets=("wo",), rank_stabilized=True)
    assert stabilized.scale == 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wo, self.w1 = nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)

    def forward(self, x):
        return self.w1(self.wo(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x):
        return self.layers[0](x)


def test_peft_reads_what_is_written_and_is_read(tmp_path):
    peft = pytest.importorskip("peft", reason="the library that defines the layout is not installed")
    torch.manual_seed(0)
    network, x = Network(), torch.randn(6, 5)
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}

    def ours(adapter, tensors):
        other = Network()
        other.load_state_dict(merged(weights, adapter, tensors))
        return other(x)

    save_adapter(tmp_path / "ours", ADAPTER, matrices())
    theirs = peft.PeftModel.from_pretrained(network, str(tmp_path / "ours"))
    assert_close(theirs(x), ours(ADAPTER, matrices()))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert_close(theirs(x), ours(*read_adapter(tmp_path / "theirs")))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, 'its peft_type is not "LORA"'),
        ({"use_dora": True}, {}, "adapters with use_dora are not known here"),
        ({"bias": "all"}, {}, "adapters with bias are not known here"),
        ({"rank_pattern": {"w1": 4}}, {}, "adapters with rank_pattern"),
        ({"r": 0}, {}, "r must be a whole number above 0"),
        ({"r": 3}, {}, "and r is 3"),
        ({"lora_alpha": "high"}, {}, "lora_alpha a number"),
        ({}, {"layers.0.wo.lora_A.weight": None}, "has no counterpart"),
        ({}, {"base_model.model.head.weight": torch.ones(2)}, "head.weight is no matrix of a LoRA adapter"),
        ({}, {"base_model.model.layers.0.wo.lora_A.weight": torch.full((2, 5), torch.nan)}, "holds NaN"),
    ],
)
def test_what_is_no_adapter_of_a_known_kind(tmp_path, config, tensors, message):
    save_adapter(tmp_path, ADAPTER, matrices())
    stored = load_file(tmp_path / "adapter_model.safetensors") | {
        name: value for name, value in tensors.items() if value is not None
    }
    for name in (name for name, value in tensors.items() if value is None):
        del stored[f"base_model.model.{name}"]
    save_file(stored, tmp_path / "adapter_model.safetensors")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError) as caught:
        read_adapter(tmp_path)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_no_adapter_and_one_of_another_model(tmp_path):
    with pytest.raises(UserError, match=r"is not a LoRA adapter: it has no adapter_config.json"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match=r"the weights have no layers.0.w1.weight"):
        merged({"layers.0.wo.weight": torch.ones(3, 5)}, ADAPTER, matrices())
    with pytest.raises(UserError, match=r"is \[3, 5\], the weights \[3, 6\]"):
        merged({"layers.0.wo.weight": torch.ones(3, 6)}, ADAPTER, matrices())
