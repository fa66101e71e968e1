"""Codes of images that a frozen tokenizer has already encoded."""

import torch
from torch import Tensor

from grpo.data.stream import ImageBatch
from grpo.models import VQModel


class CodeCache:
    """Encodes each image of a data set once on this rank, when enabled; otherwise encodes every batch.

    For a frozen encoder and images that are the same on every read, as `ImageDataset`'s are. Codes are kept in host
    memory, 2 bytes each for codebooks up to 32,768 and 4 beyond: 0.7 GB for ImageNet at 256 tokens an image.

    Args:
        tokenizer: its `encode` makes codes [B, T] int64 of images [B, 3, H, W] in [-1, 1].
        num_images: size of the data set, above every value of `ImageBatch.indices`.
        enabled: keep codes at all.
    """

    def __init__(self, tokenizer: VQModel, *, num_images: int, enabled: bool) -> None:
        self._encode, self._enabled = tokenizer.encode, enabled
        self._dtype = torch.int16 if tokenizer.config.codebook_size <= 2**15 else torch.int32
        self._known = torch.zeros(num_images if enabled else 0, dtype=torch.bool)
        self._codes: Tensor | None = None  # [N, T]; its pages are not in memory before they are written

    def codes(self, batch: ImageBatch) -> Tensor:
        """Codes [B, T] int64 of the batch's images, on the images' device."""
        if not self._enabled:
            return self._encode(batch.images)
        assert batch.indices is not None, "caching needs the images' places in the data set"
        indices = batch.indices.tolist()
        new_rows = {index: row for row, index in enumerate(indices) if not self._known[index]}
        if new_rows:
            codes = self._encode(batch.images[list(new_rows.values())])
            if self._codes is None:
                self._codes = torch.empty(len(self._known), codes.shape[1], dtype=self._dtype)
            self._codes[list(new_rows)] = codes.to("cpu", self._dtype)
            self._known[list(new_rows)] = True
        return self._codes[indices].to(batch.images.device, torch.int64)
