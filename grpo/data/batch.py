"""What a stream hands out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.models import Condition, normalize


class ImageBatch(NamedTuple):
    """Images of one step on this rank.

    images      [B, 3, H, W] uint8 as a stream hands them out, fp32 in [-1, 1] after `to`: a quarter of the bytes go to
                the device; empty, with H = W = 0, where the data set has conditions only
    condition   B rows, what a generator would be asked for to draw them
    sample_ids  [B] int64, running numbers over the whole run and all ranks: row ids of counter-based randomness
    indices     [B] int64, places in the data set, or None: keys of `CodeCache`
    captions    B texts, what was asked for in words: the class names
    codes       [B, T] int64, the images' codes where the data set has them on disk, or None
    """

    images: Tensor
    condition: Condition
    sample_ids: Tensor
    indices: Tensor | None = None
    captions: Sequence[str] = ()
    codes: Tensor | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The same batch on another device, except for `indices`: the host reads them, and must not wait for a GPU."""
        codes = None if self.codes is None else self.codes.to(device)
        images = self.images.to(device)
        images = normalize(images) if images.dtype == torch.uint8 else images
        condition, sample_ids = self.condition.to(device), self.sample_ids.to(device)
        return ImageBatch(images, condition, sample_ids, self.indices, self.captions, codes)

    def select(self, rows: slice) -> "ImageBatch":
        """Some of the images."""
        indices = None if self.indices is None else self.indices[rows]
        condition = self.condition.select(rows)
        codes = None if self.codes is None else self.codes[rows]
        return ImageBatch(self.images[rows], condition, self.sample_ids[rows], indices, self.captions[rows], codes)

    def parts(self, size: int) -> list["ImageBatch"]:
        """The batch in parts of at most `size` images."""
        return [self.select(slice(start, start + size)) for start in range(0, self.rows, size)]
