"""How sequences of a generator grow row by row, whatever computes the rows."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grpo.models.condition import Condition
from grpo.models.generator import Generator


class CachedForward:
    """The model's own `prefill` and `extend`: plain torch, and the interface of what families have in its place.

    Args:
        model: its parameters stay whole, and where they are, while it is used.
    """

    reads_filled_part = False
    """Whether `extend` finds by itself which part of the cache is filled; otherwise it reads all that it is given."""

    def __init__(self, model: Generator) -> None:
        self.model = model

    @property
    def weights(self) -> Sequence[Tensor]:
        """What `extend` and the projection read."""
        return [*self.model.parameters()]

    @property
    def projection(self) -> Tensor:
        """[V, D], which makes logits of hidden states."""
        return self.model.output.weight

    def prefill(self, condition: Condition, cache: Any) -> Tensor:
        """As the model's."""
        return self.model.prefill(condition, cache)  # all rows of a condition in one forward, whose products are large

    def extend(self, tokens: Tensor, position: Tensor, cache: Any) -> Tensor:
        """As the model's."""
        return self.model.extend(tokens, position, cache)

    def refresh(self) -> None:
        """Take up the model's present weights. A CUDA graph of `extend` stays true if `weights` are where they were."""
