"""What every source of text features has in common."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from grpo.config import UserError, shorten
from grpo.models import TextCondition

LARGEST_TEXT = 2**20  # characters of one text: beyond, it is no caption


class TextEncoder:
    """Gives texts as a model with P condition rows of C features sees them.

    A subclass says what it is (`identity`), of which texts it has no features (`missing`, in words `lacks` and
    `remedy`), and gives them.
    """

    lacks = "there are no features of"
    remedy = "change the text"

    def __init__(self, *, rows: int, width: int) -> None:
        self.rows, self.width = rows, width  # P and C

    @property
    def identity(self) -> dict[str, str | int]:
        """What would be another for other features: it goes into a run's checkpoints."""
        raise NotImplementedError

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those of the texts that it has no features of, each once."""
        return []

    def require(self, texts: Sequence[str]) -> None:
        """Raise a UserError where some of the texts have no features."""
        if missing := self.missing(texts):
            others = f" (and {len(missing) - 1} more texts)" if len(missing) > 1 else ""
            raise UserError(f"{self.lacks} {shorten(missing[0])!r}{others}: {self.remedy}")

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        """[L, C] fp32 of each text, a row a token, at least one; of more than P the first P are used."""
        raise NotImplementedError

    def __call__(self, texts: Sequence[str]) -> TextCondition:
        """R texts, which may be the same -> R rows."""
        distinct = list(dict.fromkeys(texts))
        found = dict(zip(distinct, self.features(distinct), strict=True))
        return as_rows([found[text] for text in texts], rows=self.rows)


class TextList:
    """What R texts ask for, as a condition that is made when its rows are selected: its features may be many."""

    def __init__(self, texts: Sequence[str], encoder: TextEncoder) -> None:
        self.texts, self.encoder = list(texts), encoder

    @property
    def rows(self) -> int:
        """R."""
        return len(self.texts)

    def select(self, rows: slice | Tensor) -> TextCondition:
        """The given rows."""
        chosen = self.texts[rows] if isinstance(rows, slice) else [self.texts[row] for row in rows.tolist()]
        return self.encoder(chosen)


def as_rows(features: Sequence[Tensor], *, rows: int) -> TextCondition:
    """Features [L, C] of each text -> [R, P, C], padded with zeros on the left as LlamaGen does; cut after P rows."""
    padded = torch.zeros(len(features), rows, features[0].shape[1])
    mask = torch.zeros(len(features), rows, dtype=torch.bool)
    for row, found in enumerate(features):
        kept = found[:rows]
        padded[row, rows - len(kept) :] = kept
        mask[row, rows - len(kept) :] = True
    return TextCondition(padded, mask)


def clean_text(text: object, where: str) -> str:
    """A text as it is kept: white space is collapsed. Raises a UserError: it is empty, too long, or no text."""
    if not isinstance(text, str):
        raise UserError(f"{where}: a text is expected, not {shorten(repr(text))}")
    if len(text) > LARGEST_TEXT:
        raise UserError(f"{where}: the text has {len(text)} characters, more than {LARGEST_TEXT}")
    if not (words := text.encode("utf-8", "replace").decode().split()):
        raise UserError(f"{where}: the text is empty; write one or remove the line")
    return " ".join(words)
