"""Requests by LlamaGen's lists and features: the long or the short caption of an image."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from grpo.config import Model, Text, UserError
from grpo.data.caption_files import CaptionFolder, ListedIn
from grpo.data.captions import Asked, Requests
from grpo.data.dataset import ImageDataset
from grpo.data.unreadable import UnreadableImage
from grpo.models import Condition
from grpo.texts import LlamaGenFeatures, as_rows

SHARE_STREAM = 4  # beside the draw of one of several captions, 3


class LlamaGenRequests(Requests):
    """The caption of an image by its place in a list, or, for a share of the samples, the short one.

    An image without a file of features is passed over as one that cannot be read (there its row has no loss).

    Raises:
        UserError: the data set has no such lists, or the folder has no features of one of them.
    """

    def __init__(self, dataset: ImageDataset, text: Text, model: Model) -> None:
        self.listed = dataset.listed if isinstance(dataset, CaptionFolder) else []
        if not self.listed:
            raise UserError(
                f"text.llamagen_features are of LlamaGen's lists, and data.path {dataset.data.path} has none: encode "
                "the captions with `grpo encode-text` and give text.features"
            )
        assert dataset.captions_of is not None
        assert model.caption_dim is not None
        assert text.llamagen_features is not None
        self.captions, self.rows, self.width = dataset.captions_of, model.cls_token_num, model.caption_dim
        self.long = self.short = LlamaGenFeatures(text.llamagen_features, rows=self.rows, width=self.width)
        self.short_share = 0.0
        if text.llamagen_short_features is not None:
            self.short = LlamaGenFeatures(text.llamagen_short_features, rows=self.rows, width=self.width)
            self.short_share = text.short_share
        for features in dict.fromkeys((self.long, self.short)):
            for name in dict.fromkeys(place.name for place in self.listed):
                if not (features.folder / name).is_dir():
                    raise UserError(f"{features.folder} has no folder {name}: features of the list {name}.jsonl")

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """Features are known by those of each list's first image: another encoder would have others there."""
        lists, files = hashlib.sha256(repr(self.listed).encode()).hexdigest(), hashlib.sha256()
        first = {place.name: place for place in reversed(self.listed)}
        for features in dict.fromkeys((self.long, self.short)):
            for place in first.values():
                files.update(self._bytes_of(features, place))
        told = {"captions": self.captions.fingerprint, "lists": lists, "features": files.hexdigest()}
        return {"encoder": "llamagen", "width": self.width, **told}

    def _bytes_of(self, features: LlamaGenFeatures, place: ListedIn) -> bytes:
        try:
            return features.row(*place).numpy().tobytes()
        except UserError:  # is told where a sample asks for it
            return b""

    def draw(self, index: int, sample_id: int, seed: int) -> Asked:
        is_short = np.random.default_rng((seed, sample_id, SHARE_STREAM)).random() < self.short_share
        texts, place = self.captions.of(index), self.listed[index]
        try:
            if is_short:
                return Asked(texts[0].partition(".")[0], self.short.row(*place))
            return Asked(texts[0], self.long.row(*place))
        except UserError as error:
            raise UnreadableImage(error.problems) from error

    def condition(self, asked: Sequence[Asked]) -> Condition:
        return as_rows([one.features for one in asked], rows=self.rows)
