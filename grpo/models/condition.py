"""What an image is asked to be: the one type for it, from the loader to the evaluation.

A row of a condition asks for one image. Each row has an unconditional counterpart, for classifier-free guidance and for
training with dropped conditions (Ho & Salimans, arXiv 2207.12598): the same row, marked as dropped. What such a row
looks like to a model (the embedding of no class, the null text) is the model's own business.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

CONDITION_PLACE = 0  # of the dropout of whole conditions, before a model's blocks


@dataclass(frozen=True, kw_only=True)
class Condition:
    """R requested images; every tensor has R rows."""

    dropped: Tensor | None = None  # [R] bool, the rows that ask for nothing in particular; None is no row
    group: int = 1  # rows are equal in groups of so many, one after the other: a model may compute one of each

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def rows(self) -> int:
        """R."""
        return len(next(iter(self.tensors().values())))

    @property
    def length(self) -> int:
        """Rows that each takes in a model's sequence."""
        return 1

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return next(iter(self.tensors().values())).device

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The condition with `function` applied to each of its tensors. Nothing is known of equal rows any more."""
        return self._mapped(function, group=1)

    def _mapped(self, function: Callable[[Tensor], Tensor], *, group: int) -> Self:
        return replace(self, group=group, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def select(self, rows: slice | Tensor) -> Self:
        """The given rows. What a slice cuts into stays known as groups of fewer equal rows."""
        group = 1
        if isinstance(rows, slice):
            chosen = range(self.rows)[rows]
            group = math.gcd(self.group, chosen.start, len(chosen)) if chosen.step == 1 else 1
        return self._mapped(lambda tensor: tensor[rows], group=group)

    def one_of_each_group(self) -> Self:
        """R / group rows."""
        return self._mapped(lambda tensor: tensor[:: self.group], group=1)

    def repeat_interleave(self, count: int) -> Self:
        """Every row `count` times in succession."""
        return self._mapped(lambda tensor: tensor.repeat_interleave(count, dim=0), group=self.group * count)

    def to(self, device: torch.device | str) -> Self:
        """The same rows on another device."""
        return self._mapped(lambda tensor: tensor.to(device), group=self.group)

    def joined(self, other: Self) -> Self:
        """These rows, then those of a condition of the same kind."""
        tensors, others = self.tensors(), other.tensors()
        assert tensors.keys() == others.keys(), "both have the same tensors"
        joined = {name: torch.cat([tensor, others[name]]) for name, tensor in tensors.items()}
        return replace(self, group=math.gcd(self.group, other.group), **joined)

    def equal_rows(self, other: Self) -> Tensor:
        """[R] bool: whether a row asks for the same as the other condition's."""
        others = other.tensors()
        equal = [(tensor == others[name]).flatten(1).all(1) if tensor.ndim > 1 else tensor == others[name]
                 for name, tensor in self.tensors().items()]  # fmt: skip
        return torch.stack(equal).all(0)

    def padded(self, rows: int) -> Self:
        """The rows again and again until there are `rows`."""
        return self.select(torch.arange(rows, device=self.device) % self.rows)

    def drop(self, rows: Tensor) -> Self:
        """The rows where `rows` [R] bool holds become unconditional."""
        return replace(self, group=1, dropped=rows if self.dropped is None else self.dropped | rows)

    def unconditional(self) -> Self:
        """The unconditional counterpart of every row."""
        dropped = self.drop(torch.ones(self.rows, dtype=torch.bool, device=self.device))
        return replace(dropped, group=self.group)

    def with_unconditional(self) -> Self:
        """2R rows: these, then their unconditional counterparts, as classifier-free guidance takes them."""
        both = self.map(lambda tensor: torch.cat([tensor, tensor]))
        return replace(both.drop(torch.arange(both.rows, device=self.device) >= self.rows), group=self.group)


@dataclass(frozen=True)
class ClassCondition(Condition):
    """One class an image."""

    class_ids: Tensor  # [R] int64; a model's `num_classes` is its unconditional slot, which a dropped row uses too


@dataclass(frozen=True)
class TextCondition(Condition):
    """One text an image, as features of a text encoder, a row a token.

    Raises a ValueError if the shapes do not fit together, or (on the CPU, where looking costs nothing) if a text has no
    token.
    """

    features: Tensor  # [R, P, C] fp32, padded to P tokens; LlamaGen pads on the left, with zeros
    mask: Tensor  # [R, P] bool, where a token stands

    def __post_init__(self) -> None:
        features, mask = self.features, self.mask
        if features.ndim != 3 or not features.is_floating_point():
            raise ValueError(f"text features must be [R, P, C] numbers, not {[*features.shape]} {features.dtype}")
        if mask.shape != features.shape[:2] or mask.dtype != torch.bool:
            wanted = [*features.shape[:2]]
            raise ValueError(f"the mask of the text must be {wanted} bool, not {[*mask.shape]} {mask.dtype}")
        if mask.device.type == "cpu" and not mask.any(1).all():
            raise ValueError(f"text {int((~mask.any(1)).nonzero()[0])} has no token: its mask is all zeros")

    @property
    def length(self) -> int:
        return self.mask.shape[1]


def as_condition(condition: Condition | Tensor) -> Condition:
    """A condition as it is; class ids [R] as a `ClassCondition`. Where users call, both are taken."""
    return condition if isinstance(condition, Condition) else ClassCondition(condition)
