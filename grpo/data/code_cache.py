"""Codes of a batch of images: from disk, from memory, or by the tokenizer."""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.config import UserError
from grpo.data.batch import ImageBatch
from grpo.data.code_files import CodeFolder, differences
from grpo.data.code_reader import CodeReader
from grpo.data.dataset import ImageDataset
from grpo.models import VQModel, weights_sha256


def build_codes(
    dataset: ImageDataset, tokenizer: VQModel | None, *, length: int, augmented: bool, images: bool
) -> Callable[[ImageBatch], Tensor]:
    """How to get the codes [B, T] int64 of a batch of this data set, on the batch's device.

    Codes on disk (data.codes, or a data set of codes alone) travel with the batch, so the data set hands them out from
    here on, and images only where they are wanted besides. Otherwise the tokenizer encodes, each image once where
    data.cache_codes is on.

    Args:
        tokenizer: what codes on disk must have been made by; None only where there are such codes.
        length: T.
        augmented: whether crops and mirror images, where they were encoded, may stand for the image.
        images: whether the batch is to have images besides its codes.

    Raises:
        UserError: the codes on disk are of other images, labels, sizes or weights.
    """
    data = dataset.data
    if data.codes is not None:
        dataset.codes = CodeFolder(data.codes)
    codes = dataset.codes
    if codes is None:
        assert tokenizer is not None, "which makes the codes"
        return CodeCache(tokenizer, num_images=len(dataset), enabled=data.cache_codes).codes
    _check(codes, dataset, tokenizer, length)
    if not augmented:
        codes.only_plain()
    dataset.reads_images = dataset.has_images and images
    return _of_batch


def _of_batch(batch: ImageBatch) -> Tensor:
    assert batch.codes is not None, "codes on disk travel with it"
    return batch.codes


def _check(codes: CodeReader, dataset: ImageDataset, tokenizer: VQModel | None, length: int) -> None:
    """That codes on disk are what the recipe takes them for."""
    if isinstance(codes, CodeFolder):
        wanted = dataset.fingerprint if dataset.has_images else {"image_size": dataset.data.image_size}
        if tokenizer is not None:
            wanted = {**wanted, "tokenizer": weights_sha256(tokenizer)}
        if different := differences(codes.about["fingerprint"], wanted):
            raise UserError(
                f"{codes} holds codes of something else: {', '.join(different)} differ; encode the data set again "
                "into another folder, or bring back what has changed"
            )
    if codes.length != length:
        raise UserError(
            f"{codes} has {codes.length} codes an image, and data.image_size and tokenizer.downsample_size ask for "
            f"{length}: correct them or encode again"
        )
    if tokenizer is not None:
        codes.codebook_size = tokenizer.config.codebook_size


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
        self._codes = torch.empty(0)  # [N, T] from the first codes on; pages are in memory once written

    def codes(self, batch: ImageBatch) -> Tensor:
        """Codes [B, T] int64 of the batch's images, on the images' device."""
        if not self._enabled:
            return self._encode(batch.images)
        assert batch.indices is not None, "caching needs the images' places in the data set"
        indices = batch.indices.tolist()
        new_rows = {index: row for row, index in enumerate(indices) if not self._known[index]}
        if new_rows:
            codes = self._encode(batch.images[list(new_rows.values())])
            if not self._codes.numel():
                self._codes = torch.empty(len(self._known), codes.shape[1], dtype=self._dtype)
            self._codes[list(new_rows)] = codes.to("cpu", self._dtype)
            self._known[list(new_rows)] = True
        return self._codes[indices].to(batch.images.device, torch.int64)
