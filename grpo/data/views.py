"""The views of an image that are encoded: itself, its mirror image, ten crops."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from grpo.config import Encode
from grpo.data.dataset import ImageDataset, UnreadableImage
from grpo.data.images import center_crop, to_pixels
from grpo.data.worker import init_worker


@dataclass(frozen=True)
class Views:
    """How an image is looked at, as LlamaGen's `extract_codes_c2i.py` does."""

    config: Encode
    size: int  # S

    @property
    def count(self) -> int:
        """A, views of an image."""
        return {"none": 1, "flip": 2, "ten_crop": 10 * len(self.config.crop_ranges)}[self.config.augmentation]

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> [A, 3, S, S] uint8.

        none: the centre crop. flip: that and its mirror image. ten_crop, for each range r: of the centre crop of
        int(r S) pixels its four corners and centre, in torchvision's order, then the same of its mirror image.
        """
        if self.config.augmentation != "ten_crop":
            plain = center_crop(image, self.size)
            views = [plain] if self.config.augmentation == "none" else [plain, ImageOps.mirror(plain)]
        else:
            wholes = [center_crop(image, int(self.size * crop_range)) for crop_range in self.config.crop_ranges]
            views = [crop for whole in wholes for side in (whole, ImageOps.mirror(whole)) for crop in self._five(side)]
        return torch.stack([to_pixels(view) for view in views])

    def _five(self, image: Image.Image) -> list[Image.Image]:
        """Four corners and the centre, S pixels wide."""
        size, last = self.size, image.width - self.size
        middle = round(last / 2)
        corners = ((0, 0), (last, 0), (0, last), (last, last), (middle, middle))
        return [image.crop((left, top, left + size, top + size)) for left, top in corners]


class Viewed(NamedTuple):
    """Views of some neighbouring images."""

    rows: range
    readable: list[int]  # those of `rows` that could be read
    pixels: Tensor | None  # [n, A, 3, S, S] uint8 of them; None where there are none
    unreadable: dict[int, str]


class _Rows(TorchDataset):
    """The data set addressed by ranges; runs in the workers."""

    def __init__(self, dataset: ImageDataset, views: Views) -> None:
        self.dataset, self.views = dataset, views

    def __getitem__(self, rows: range) -> Viewed:
        readable, pixels, unreadable = [], [], {}
        for index in rows:
            try:
                pixels.append(self.views(self.dataset.whole(index)))
                readable.append(index)
            except UnreadableImage as error:
                unreadable[index] = str(error)
        return Viewed(rows, readable, torch.stack(pixels) if pixels else None, unreadable)


def load_views(dataset: ImageDataset, parts: Iterable[range], views: Views, *, num_workers: int) -> Iterator[Viewed]:
    """The views of each part of the data set, in order."""
    rows = _Rows(dataset, views)
    generator = torch.Generator()
    loader = DataLoader(
        rows, sampler=parts, batch_size=None, num_workers=num_workers, worker_init_fn=init_worker, generator=generator
    )
    return iter(loader)
