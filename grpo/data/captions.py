"""What images are asked to be in words: the captions of a data set, and how one of them is drawn."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from grpo.config import Data, UserError
from grpo.models import Condition
from grpo.texts import CAPTION_KEYS, TextEncoder, as_rows, clean_text

logger = logging.getLogger(__name__)

CAPTION_STREAM = 3  # beside the views of images on disk, 1, and the windows of a stream, 2


class Captions:
    """One text or several of each of N images, or of N requests without images.

    They are in one array, for counting references to a million texts would copy them into every worker's memory.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        encoded = [text.encode() for of_image in texts for text in of_image]
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._first = np.cumsum([0, *map(len, texts)])  # of each image

    def __len__(self) -> int:
        return len(self._first) - 1

    def of(self, index: int) -> list[str]:
        """The texts of an image, at least one."""
        return [self._at(place) for place in range(self._first[index], self._first[index + 1])]

    def _at(self, place: int) -> str:
        return self._text[self._ends[place] : self._ends[place + 1]].tobytes().decode()

    def distinct(self) -> list[str]:
        """All texts, each once, in the order of the images."""
        return list(dict.fromkeys(self._at(place) for place in range(len(self._ends) - 1)))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the texts, and whose they are."""
        digest = hashlib.sha256()
        for part in (self._text, self._ends, self._first):
            digest.update(len(part).to_bytes(8, "big") + part.tobytes())
        return digest.hexdigest()


def texts_in(value: object, where: str) -> list[str]:
    """The texts of an image as a source holds them: one, several in a list, or none; empty ones are no texts.

    Raises a UserError where what is there is no text.
    """
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [clean_text(text, where) for text in values if not isinstance(text, str) or text.strip()]


class Asked(NamedTuple):
    """What one sample asks for."""

    text: str
    features: Tensor  # [L, C] fp32


class Requests(Protocol):
    """How the samples of a data set ask for images in words."""

    @property
    def identity(self) -> dict[str, str | int]:
        """What would be another where the samples asked for something else."""

    def draw(self, index: int, sample_id: int, seed: int) -> Asked:
        """What that sample of a run asks for, a function of these numbers. Raises `UnreadableImage`."""

    def condition(self, asked: Sequence[Asked]) -> Condition:
        """R of them -> R rows."""


def pick_text(texts: Sequence[str], sample_id: int, seed: int) -> str:
    """One of the captions of a sample, all equally likely: a function of the seed and the sample's number."""
    if len(texts) == 1:
        return texts[0]
    return texts[int(np.random.default_rng((seed, sample_id, CAPTION_STREAM)).integers(len(texts)))]


class CaptionRequests(Requests):
    """A caption of the image, all of them equally likely, with the features that the encoder gives."""

    def __init__(self, captions: Captions, encoder: TextEncoder) -> None:
        self.captions, self.encoder = captions, encoder

    @property
    def identity(self) -> dict[str, str | int]:
        return {**self.encoder.identity, "captions": self.captions.fingerprint}

    def draw(self, index: int, sample_id: int, seed: int) -> Asked:
        text = pick_text(self.captions.of(index), sample_id, seed)
        return Asked(text, self.encoder.features([text])[0])

    def condition(self, asked: Sequence[Asked]) -> Condition:
        return as_rows([one.features for one in asked], rows=self.encoder.rows)


def texts_of(entry: Mapping[str, Any], key: str | None, where: str) -> list[str]:
    """The texts of a JSON object, under `key` or the first of `CAPTION_KEYS` that is there."""
    found = key if key is not None else next((name for name in CAPTION_KEYS if name in entry), None)
    return texts_in(entry.get(found), where) if found is not None else []


class LeftOut:
    """Counts the images without a caption, which are left out: a few are told, too many end the start."""

    def __init__(self, data: Data) -> None:
        self.data, self.count, self.first = data, 0, ""

    def note(self, problem: str) -> None:
        """One more."""
        self.count, self.first = self.count + 1, self.first or problem

    def tell(self) -> None:
        """Raise a UserError beyond `data.max_bad_images`, and warn of fewer."""
        more = f" (and {self.count - 1} more such)" if self.count > 1 else ""
        if self.count > self.data.max_bad_images:
            most = f"more than data.max_bad_images = {self.data.max_bad_images}"
            raise UserError(
                f"{self.first}{more}, {most}: write captions, or raise data.max_bad_images to leave them out"
            )
        if self.count:
            logger.warning("%s%s: left out", self.first, more)


class RequestList:
    """What R images of a data set ask for, as a condition that is made when its rows are selected.

    The images are evenly over the N of the data set, or all of them again and again where there are fewer.
    """

    def __init__(self, requests: Requests, *, length: int, count: int, seed: int) -> None:
        self.requests, self.seed, self.rows = requests, seed, count  # R
        self.indices = torch.arange(count) * length // count if count <= length else torch.arange(count) % length

    def select(self, rows: slice | Tensor) -> Condition:
        """The given rows."""
        numbers = torch.arange(self.rows)[rows].tolist()
        return self.requests.condition([self.requests.draw(int(self.indices[n]), n, self.seed) for n in numbers])
