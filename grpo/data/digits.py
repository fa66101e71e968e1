"""The 5,000 MNIST digits that ship with the project; source and licence in `digits.txt` beside them."""

from pathlib import Path

import numpy as np
from PIL import Image

from grpo.config import Data, UserError
from grpo.data.dataset import ImageDataset

NUM_CLASSES = 10
PADDING = 2  # 28 pixels to 32

# Which of the 500 images of each class belong to a split. Settings are picked on "validation", claims made on "test".
SPLITS = {
    "train": range(0, 400),
    "train_a": range(0, 200),
    "train_b": range(200, 400),
    "validation": range(400, 450),
    "test": range(450, 500),
    "heldout": range(400, 500),
    "all": range(0, 500),
}


class Digits(ImageDataset):
    """A split of the digits, white on black, padded to 32 pixels, in RGB.

    Classes take turns (image i is of class i mod 10), so every prefix is balanced.
    """

    def __init__(self, *, data: Data) -> None:
        if data.split not in SPLITS:
            raise UserError(f"data.split {data.split!r} is no part of the digits: choose one of {', '.join(SPLITS)}")
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]  # [5000, 28, 28] uint8, [5000] uint8
        of_class = np.stack([np.flatnonzero(labels == digit) for digit in range(NUM_CLASSES)])  # [10, 500]
        self._chosen = of_class[:, list(SPLITS[data.split])].T.reshape(-1)
        self._images = np.pad(images[self._chosen], ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        super().__init__(labels[self._chosen], [str(digit) for digit in range(NUM_CLASSES)], data=data)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def describe(self, index: int) -> str:
        return f"digit {self._chosen[index]}"
