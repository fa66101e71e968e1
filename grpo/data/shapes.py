"""The world of shapes as a data set: drawn when it is read, with captions."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from grpo.config import Data
from grpo.data.captions import Captions
from grpo.data.dataset import ImageDataset
from grpo.data.images import to_image
from grpo.shapes import VERSION, Example, Scenes, example, render, scenes, split_size


class Shapes(ImageDataset):
    """A split of the world of shapes, see `grpo.shapes.examples`. All images are of one class, `shapes`."""

    def __init__(self, *, data: Data, with_captions: bool = False) -> None:
        examples = range(split_size(data.split))
        texts = Captions([[example(data.split, index).caption] for index in examples]) if with_captions else None
        super().__init__(np.zeros(len(examples)), [] if with_captions else ["shapes"], data=data, captions=texts)

    def identify(self) -> Iterable[bytes]:
        return b"shapes", str(VERSION).encode()

    def example(self, index: int) -> Example:
        """What the image shows and what its caption says."""
        return example(self.data.split, int(index))

    def scenes(self, indices: Sequence[int]) -> Scenes:
        """What the images show."""
        return scenes([self.example(index) for index in indices])

    def pixels(self, index: int) -> Tensor:
        return render(self.scenes([index]), self.data.image_size)[0]

    def open(self, index: int) -> Image.Image:
        return to_image(self.pixels(index))

    def describe(self, index: int) -> str:
        return f"drawing {index} of the shapes: {self.example(index).caption}"
