"""An exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.parallel import reshard


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, in fp32 and sharded like the weights: nothing is gathered.

    It starts at the weights that the model has when it is made. Only what is trained is averaged, and no buffers.

    Args:
        model: parallelized.
        decay: in [0, 1).
        into: another model, parallelized alike, whose parameters become the average, e.g. the reference of a KL term
            that follows the policy. Without it the average has tensors of its own.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float, *, into: nn.Module | None = None) -> None:
        self.model, self.decay, self.into = model, decay, into
        self._own = {name: weight.clone() for name, weight in _parameters(model).items()} if into is None else {}
        if into is not None:
            torch._foreach_copy_(*self._pairs())

    def state_tensors(self) -> dict[str, Tensor]:
        """The average by parameter name, sharded; the live tensors."""
        if self.into is None:
            return self._own
        reshard(self.into)
        averages = dict(self.into.named_parameters())
        return {name: averages[name].detach() for name in _parameters(self.model)}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights, after an optimizer step."""
        averages, weights = self._pairs()
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the model the averaged weights during the block, to export or to evaluate them. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._pairs(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's shards of the average and of the weights, in the same order."""
        averages, weights = self.state_tensors(), _parameters(self.model)
        return [_local(averages[name]) for name in weights], [_local(weight) for weight in weights.values()]


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)  # a forward without backward may have left parameters gathered
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
