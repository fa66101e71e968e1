"""Features of texts without any weights: a fixed random vector for each word at its place, behind its neighbour."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from grpo.texts.features import TextEncoder

COINS = 48  # tosses whose sum stands for a normal number, for each of the three parts
VERSION = 3  # of the vectors; others would be another encoder


class WordEncoder(TextEncoder):
    """A word is a vector of C nearly normal numbers, a function of the word, its place in the text, and the word before.

    It is the sum of three: one of the word, so that what is learned of it holds wherever it stands; one of the word at
    that place; and one of the pair of the word before it and the word. A LlamaGen model attends evenly to the rows of
    its condition, which have no positions for it, so what it sees of a text is nearly a mean. The features of a
    language model carry what belongs together; here the pairs do: without them and the places "a red ring left of a
    blue square" would be "a blue ring left of a red square". Words are runs of letters and digits, without regard to
    case.

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
        pairs = zip(found, ["", *found], strict=False)
        return torch.from_numpy(
            np.stack([word_vector(word, place, before, self.width) for place, (word, before) in enumerate(pairs)])
        )


def words_of(text: str) -> list[str]:
    """Its words, in order."""
    return re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold())


@lru_cache(maxsize=1 << 14)
def word_vector(word: str, place: int, before: str, width: int) -> np.ndarray:
    """[C] fp32 of mean 0 and variance 1: (heads - n/2) / sqrt(n/4) of n tosses each, a third of them the word's own."""
    parts = f"{VERSION} {word}", f"{VERSION} {place} {word}", f"{VERSION} {before}_{word}"
    heads, tosses = sum(_heads(part, width) for part in parts), len(parts) * COINS
    vector = (heads.astype(np.float32) - tosses / 2) / np.float32((tosses / 4) ** 0.5)
    vector.flags.writeable = False
    return vector


def _heads(text: str, width: int) -> np.ndarray:
    """[C] int64, of `COINS` tosses each."""
    tosses = hashlib.shake_256(text.encode()).digest(width * COINS // 8)
    return np.unpackbits(np.frombuffer(tosses, dtype=np.uint8)).reshape(width, COINS).sum(axis=1, dtype=np.int64)
