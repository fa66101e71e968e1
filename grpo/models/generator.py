"""What the rest of the project calls of a generator's model, whatever its family."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from grpo.models.condition import Condition


class Dropout(Protocol):
    """The random masks of a forward's rows, the same whenever a row is computed; see `grpo.kernels.Dropout`."""

    def layers(self, count: int) -> "Sequence[Dropout]":
        """Those of `count` blocks."""

    def rows(self, rate: float, *, place: int) -> Tensor:
        """[R] bool: a share `rate` of the rows."""

    def __call__(self, x: Tensor, rate: float, *, place: int) -> Tensor:
        """x [R, S, D] with a share `rate` of its features dropped and the others scaled up."""


class Generator(nn.Module):
    """A model of V codes, T an image and width D. Its family's class derives from it and defines all of this.

    It embeds the conditions that it knows, their dropped rows as its own unconditional ones. Buffers that are not in
    the state dict are rebuilt by their module's `_apply`, as in `grpo.models.gpt.Rotary`.
    """

    config: Any
    """Its sizes, a frozen dataclass with `block_size` T, `vocab_size` V and `dim` D."""
    layers: nn.ModuleList
    """Its blocks, the units of recomputation, compilation and sharding."""
    cls_embedding: nn.Module
    """What embeds a condition."""
    output: nn.Linear
    """The projection of hidden states to V logits."""
    adapter: Any = None
    """The `grpo.formats.Adapter` that is trained in the place of its weights, or None."""
    forward_methods: ClassVar[tuple[str, ...]]
    """The names of what is called besides `forward` and needs whole parameters."""
    prefix_length: ClassVar[int]
    """Rows of a cache that `prefill` fills."""

    @abstractmethod
    def hidden(self, tokens: Tensor, condition: Condition | Tensor, dropout: Dropout | None = None) -> Tensor:
        """tokens [B, S] -> [B, S + 1, D], what `output` is applied to; `forward` is that, after it.

        They drop where they are given a `grpo.kernels.Dropout`, by its masks alone.
        """

    @abstractmethod
    def init_cache(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str, length: int | None = None
    ) -> Any:
        """A tuple of tensors with the methods of `KVCache`."""

    @abstractmethod
    def prefill(self, condition: Condition | Tensor, cache: Any) -> Tensor:
        """The first row of `hidden`, [B, D], for the conditions of B sequences."""

    @abstractmethod
    def extend(self, tokens: Tensor, position: Tensor, cache: Any) -> Tensor:
        """The next, [B, D], for one more code of each: tokens [B]; in static shapes."""
