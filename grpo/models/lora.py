"""Low-rank adapters in a generator's blocks (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from grpo.config import Lora, Model, UserError
from grpo.formats import Adapter, add_product, read_adapter
from grpo.models.generator import Generator

MARKS = (".lora_A.", ".lora_B.")


class LoraLinear(nn.Module):
    """W x + scale B A x, of which only A [rank, in] and B [out, rank] are trained; B starts at 0.

    Attributes:
        is_on: without, it is the linear layer that it was.
    """

    def __init__(self, linear: nn.Linear, adapter: Adapter) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.weight, self.scale, self.is_on = linear.weight, adapter.scale, True
        self.lora_A = nn.Linear(inputs, adapter.rank, bias=False, device=linear.weight.device)
        self.lora_B = nn.Linear(adapter.rank, outputs, bias=False, device=linear.weight.device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y + self.scale * self.lora_B(self.lora_A(x)) if self.is_on else y


def add_adapter(model: Generator, adapter: Adapter) -> Generator:
    """Give the linear layers that an adapter names, in all blocks, its matrices; in place. Nothing else is trained.

    The model knows it as `model.adapter`. Raises a UserError: no layers of that name.
    """
    found = {
        name.rpartition(".")[2]: None
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }  # fmt: skip
    if unknown := [name for name in adapter.targets if name not in found]:
        raise UserError(f"lora.targets: the model's blocks have no linear layers {unknown[0]}; they have {[*found]}")
    model.requires_grad_(False)
    for block in model.layers:
        for parent in list(block.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear) and name in adapter.targets:
                    setattr(parent, name, LoraLinear(module, adapter))
    model.adapter = adapter
    return model


def mark_trained(model: Generator, section: Model, lora: Lora) -> Generator:
    """Leave a gradient to those parameters alone that a recipe trains, in place; with `lora.rank`, add an adapter."""
    if section.trained == "embeddings":
        model.requires_grad_(False)
        model.cls_embedding.requires_grad_(True)
    if not lora.rank:
        return model
    alpha = lora.alpha or 2.0 * lora.rank
    return add_adapter(
        model, Adapter(rank=lora.rank, alpha=alpha, targets=tuple(lora.targets), base=section.checkpoint)
    )


def load_adapter(model: Generator, path: str) -> None:
    """Give a model's adapter the matrices of a folder. Raises a UserError if they are not of such an adapter."""
    stored, matrices = read_adapter(path)
    own: Adapter = model.adapter
    fresh = adapter_matrices(model.state_dict())
    if stored.scale != own.scale or {name: value.shape for name, value in fresh.items()} != {
        name: value.shape for name, value in matrices.items()
    }:
        keys = f"lora.rank = {stored.rank}, lora.alpha = {stored.alpha:g}, lora.targets = {','.join(stored.targets)}"
        raise UserError(f"model.adapter: {path} is not the adapter that the recipe trains; it takes {keys}")
    model.load_state_dict(matrices, strict=False)


def whole_weight(linear: nn.Linear | LoraLinear) -> Tensor:
    """The matrix that a layer multiplies by, [out, in], without a gradient; with an adapter a new one."""
    weight = linear.weight.detach()
    if not isinstance(linear, LoraLinear) or not linear.is_on:
        return weight
    up, down = linear.lora_B.weight.detach(), linear.lora_A.weight.detach()
    return add_product(weight, up, down, scale=linear.scale)


def adapter_matrices(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a state dict that belong to an adapter."""
    return {name: tensor for name, tensor in weights.items() if any(mark in name for mark in MARKS)}


class WithoutAdapter:
    """A model as it is without its adapter: its `hidden` and its projection, from the same weights, without gradient.

    It stands for a frozen copy of the model from before the adapter was trained, and takes no memory.
    """

    def __init__(self, model: Generator) -> None:
        self.model, self.config, self.output = model, model.config, model.output

    def hidden(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's."""
        with _off(self.model):
            return self.model.hidden(*args, **kwargs)


@contextmanager
def _off(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True
