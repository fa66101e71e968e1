"""What an image was asked to be, in words, for rewards that compare it with a text."""

from collections.abc import Callable, Sequence

import torch
from pydantic import field_validator
from torch import Tensor

from grpo.config import RewardTable
from grpo.models import ClassCondition
from grpo.rewards.base import DecodedBatch

AT_ONCE = 256  # texts encoded in one forward
MOST_KEPT = 1 << 16  # texts whose features are kept; 256 MB of CLIP-H


class WordsTable(RewardTable):
    """What every reward that compares an image with a text has."""

    template: str = "a photo of {}"
    """The text of a class; {} stands for its name. A prompt is taken as it is."""
    first_alias: bool = False
    """Take of a class name only what stands before its first comma: "tench" of "tench, Tinca tinca"."""

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if "{}" not in value:
            raise ValueError("must have {} where the name of the class goes")
        return value

    def texts(self, batch: DecodedBatch) -> list[str]:
        """b texts, one for each caption of the batch."""
        if not isinstance(batch.condition, ClassCondition):
            return list(batch.captions)
        names = [name.partition(",")[0] if self.first_alias else name for name in batch.captions]
        return [self.template.replace("{}", name) for name in names]


class TextFeatures:
    """Features of texts, each computed once."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor]) -> None:
        self.encode = encode  # k texts -> [k, D]
        self.known: dict[str, Tensor] = {}  # text -> [D]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """b texts -> [b, D]."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if len(self.known) + len(new) > MOST_KEPT:
            self.known, new = {}, list(dict.fromkeys(texts))
        for start in range(0, len(new), AT_ONCE):
            part = new[start : start + AT_ONCE]
            self.known.update(zip(part, self.encode(part), strict=True))
        return torch.stack([self.known[text] for text in texts])
