"""Random images for trying the machinery."""

import zlib

import numpy as np
from PIL import Image

from grpo.config import Data
from grpo.data.dataset import ImageDataset

MIN_LENGTH = 1024
PATCHES = 4  # side of the random colours that are blown up to one image


class Synthetic(ImageDataset):
    """Smooth random colour fields; index and split alone determine an image, classes take turns."""

    def __init__(self, *, data: Data, num_classes: int) -> None:
        self._seed = zlib.crc32(data.split.encode())
        class_ids = np.arange(max(MIN_LENGTH, num_classes)) % num_classes
        super().__init__(class_ids, [str(class_id) for class_id in range(num_classes)], data=data)

    def open(self, index: int) -> Image.Image:
        colors = np.random.default_rng((self._seed, index)).integers(0, 256, (PATCHES, PATCHES, 3), dtype=np.uint8)
        return Image.fromarray(colors).resize((self.data.image_size,) * 2, Image.Resampling.BICUBIC)

    def describe(self, index: int) -> str:
        return f"synthetic image {index}"
