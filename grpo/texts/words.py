"""Features of texts without any weights: a fixed random vector for each word at its place."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from grpo.texts.features import TextEncoder

COINS = 32  # tosses whose sum stands for a normal number, for each of the two parts
VERSION = 2  # of the vectors; others would be another encoder


class WordEncoder(TextEncoder):
    """A word at its place in the text is a vector of C nearly normal numbers, a function of both alone.

    It is the sum of two: one of the word, so that what is learned of it holds wherever it stands, and one of the word
    at that place. A LlamaGen model attends evenly to the rows of its condition, which have no positions for it, so what
    it sees of a text is a mean: without the second part "a red dot left of a blue square" would be "a blue square left
    of a red dot". Words are runs of letters and digits, without regard to case.

    The numbers come from a hash, as sums of coin tosses: the same on every machine.
    """

    lacks = 'text.encoder = "words" finds no word in'

    @property
    def identity(self) -> dict[str, str | int]:
        return {"encoder": "words", "version": VERSION, "width": self.width}

    def missing(self, texts: Iterable[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if not words_of(text)]

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        self.require(texts)
        return [self._vectors(text) for text in texts]

    def _vectors(self, text: str) -> Tensor:
        """[L, C]."""
        found = words_of(text)[: self.rows]
        return torch.from_numpy(np.stack([word_vector(word, place, self.width) for place, word in enumerate(found)]))


def words_of(text: str) -> list[str]:
    """Its words, in order."""
    return re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold())


@lru_cache(maxsize=1 << 14)
def word_vector(word: str, place: int, width: int) -> np.ndarray:
    """[C] fp32 of mean 0 and variance 1: (heads - n/2) / sqrt(n/4) of n tosses each, half of them the word's own."""
    heads = _heads(f"{VERSION} {word}", width) + _heads(f"{VERSION} {place} {word}", width)
    vector = (heads.astype(np.float32) - COINS) / np.float32((COINS / 2) ** 0.5)
    vector.flags.writeable = False
    return vector


def _heads(text: str, width: int) -> np.ndarray:
    """[C] int64, of `COINS` tosses each."""
    tosses = hashlib.shake_256(text.encode()).digest(width * COINS // 8)
    return np.unpackbits(np.frombuffer(tosses, dtype=np.uint8)).reshape(width, COINS).sum(axis=1, dtype=np.int64)
