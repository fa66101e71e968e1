"""The rows of a condition before the image in LlamaGen's GPT: their embeddings, and what attention makes of a text."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.models.condition import ClassCondition, Condition, TextCondition


class ClassEmbedding(nn.Module):
    """One embedding a class and, last, one for no class, which dropped rows take."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, condition: Condition) -> Tensor:
        """The rows before the image, [R, 1, D]. Raises a ValueError for anything but one class a row."""
        if not isinstance(condition, ClassCondition):
            raise ValueError(f"this model takes classes as its condition, not {type(condition).__name__}")
        class_ids = condition.class_ids
        if class_ids.ndim != 1 or class_ids.is_floating_point():
            raise ValueError(f"class ids must be [B] integers, not {[*class_ids.shape]} {class_ids.dtype}")
        if condition.dropped is not None:
            class_ids = class_ids.masked_fill(condition.dropped, self.num_classes)
        return self.embedding_table(class_ids)[:, None]


class CaptionProjection(nn.Module):
    """Two layers with a tanh-GELU between them, without biases."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features.to(self.fc1.weight.dtype)), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Text features projected to the model's width. Dropped rows take one text for no text, under their own mask."""

    uncond_embedding: Tensor  # [P, C]

    def __init__(self, rows: int, width: int, dim: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(width, dim)
        self.register_buffer("uncond_embedding", torch.randn(rows, width) / width**0.5)  # never trained

    def forward(self, condition: Condition) -> Tensor:
        """The rows before the image, [R, P, D]. Raises a ValueError for anything but texts of this model's size."""
        if not isinstance(condition, TextCondition):
            raise ValueError(f"this model takes texts as its condition, not {type(condition).__name__}")
        features, null = condition.features, self.uncond_embedding
        if features.shape[1:] != null.shape:
            wanted = f"[R, {null.shape[0]}, {null.shape[1]}]"
            raise ValueError(f"this model takes text features {wanted}, not {[*features.shape]}")
        if condition.dropped is not None:
            features = torch.where(condition.dropped[:, None, None], null.type_as(features), features)
        return self.cap_proj(features)


class TextRows(NamedTuple):
    """Where the rows of texts are in a batch of R sequences, in which groups of neighbours have the same text.

    Where each has a text of its own the batch is [R, P + S, ...]. Where groups share one, its rows exist once: the
    batch is [R / group * P + R * S, ...], the rows of all texts, then those of all codes.
    """

    mask: Tensor  # [R / group, P] bool, where a token stands
    group: int

    def join(self, texts: Tensor, codes: Tensor) -> Tensor:
        """[R / group, P, ...] and [R, S, ...] as one batch."""
        if self.group == 1:
            return torch.cat([texts, codes], dim=1)
        return torch.cat([texts.flatten(0, 1), codes.flatten(0, 1)])

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of a batch."""
        texts, length = self.mask.shape
        if self.group == 1:
            return x[:, :length], x[:, length:]
        rows, sequences = texts * length, texts * self.group
        codes = x[rows:].unflatten(0, (sequences, (len(x) - rows) // sequences))
        return x[:rows].unflatten(0, (texts, length)), codes

    def for_each_row(self, x: Tensor) -> Tensor:
        """[R / group, ...] -> [R, ...]."""
        return x if self.group == 1 else x.repeat_interleave(self.group, dim=0)


def text_mask(condition: Condition) -> Tensor | None:
    """[R, P] bool, where a text has tokens; None for a condition without text."""
    return condition.mask if isinstance(condition, TextCondition) else None


def attend_evenly(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What each row of a text sees, [B, P, heads, D], and what all rows after it see of it, [B, heads, D].

    A row attends to itself and to the tokens before it, all with the same weight. values [B, P, heads, D], mask [B, P].
    """
    rows = mask.shape[1]
    diagonal = torch.eye(rows, dtype=torch.bool, device=mask.device)
    seen = torch.cat([mask[:, None].expand(-1, rows, -1).tril() | diagonal, mask[:, None]], dim=1)  # [B, P + 1, P]
    sums = seen.type_as(values) @ values.flatten(2).contiguous()  # a copy, as backward keeps it and not what it is from
    means = (sums.float() / seen.sum(2, keepdim=True)).type_as(values).unflatten(2, values.shape[2:])
    return means[:, :-1], means[:, -1]


def weigh_first(queries: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eight more features with which row 0 counts as `weight` [B] rows, in attention scaled for the features so far.

    A mask would do the same, without the fast kernels. The logarithm is added in three parts, so that it has the
    accuracy of fp32 where keys are of lower precision; eight, because the kernels want a multiple.
    """
    rest = weight.float().log() * queries.shape[-1] ** 0.5
    parts = []
    for _ in range(3):
        parts.append(rest.to(keys.dtype))
        rest = rest - parts[-1].float()
    first = torch.stack(parts, dim=-1)[:, None, None].expand(-1, keys.shape[1], -1, -1)
    added = F.pad(first, (0, 5, 0, keys.shape[2] - 1))  # [B, heads, S, 8]
    return F.pad(queries, (0, 8), value=1.0), torch.cat([keys, added], dim=-1), F.pad(values, (0, 8))
