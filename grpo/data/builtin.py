"""Data sets that need no files of the user's: the digits that ship with the project, and random images."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from grpo.config import Data, UserError
from grpo.data.captions import Captions
from grpo.data.dataset import ImageDataset

NUM_DIGITS = 10
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PADDING = 2  # 28 pixels to 32

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
    """A split of 5,000 MNIST digits, white on black, padded to 32 pixels; source and licence are in `digits.txt`.

    Classes take turns (image i is of class i mod 10), so every prefix is balanced.
    """

    def __init__(self, *, data: Data, with_captions: bool = False) -> None:
        if data.split not in SPLITS:
            raise UserError(f"data.split {data.split!r} is no part of the digits: choose one of {', '.join(SPLITS)}")
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]  # [5000, 28, 28] uint8, [5000] uint8
        of_class = np.stack([np.flatnonzero(labels == digit) for digit in range(NUM_DIGITS)])  # [10, 500]
        self._chosen = of_class[:, list(SPLITS[data.split])].T.reshape(-1)
        self._images = np.pad(images[self._chosen], ((0, 0), (DIGIT_PADDING,) * 2, (DIGIT_PADDING,) * 2))
        labels, names = labels[self._chosen], [str(digit) for digit in range(NUM_DIGITS)]
        captions = Captions([[f"a handwritten {WORDS[digit]}"] for digit in labels]) if with_captions else None
        super().__init__(labels, [] if with_captions else names, data=data, captions=captions)

    def identify(self) -> Iterable[bytes]:
        return b"digits", self._images.tobytes()

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def describe(self, index: int) -> str:
        return f"digit {self._chosen[index]}"


COLORS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
    "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255), "gray": (128, 128, 128),
}  # fmt: skip


def nearest_color(color: np.ndarray) -> str:
    """The name of the colour among these that is nearest to an RGB value [3]."""
    return min(COLORS, key=lambda name: int(np.square(np.array(COLORS[name]) - color).sum()))


class Synthetic(ImageDataset):
    """Smooth random colour fields, 1,024 at least; index and split alone determine an image, classes take turns.

    A caption names the colours of two corners.
    """

    def __init__(self, *, data: Data, num_classes: int, with_captions: bool = False) -> None:
        self._seed = zlib.crc32(data.split.encode())
        class_ids = np.arange(max(1024, num_classes)) % num_classes
        names, captions = [str(class_id) for class_id in range(num_classes)], None
        if with_captions:
            names, captions = [], Captions([[self._caption(index)] for index in range(len(class_ids))])
        super().__init__(class_ids, names, data=data, captions=captions)

    def identify(self) -> Iterable[bytes]:
        return b"synthetic", str(self._seed).encode()

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._colors(index)).resize((self.data.image_size,) * 2, Image.Resampling.BICUBIC)

    def _colors(self, index: int) -> np.ndarray:
        """[4, 4, 3] uint8."""
        return np.random.default_rng((self._seed, index)).integers(0, 256, (4, 4, 3), dtype=np.uint8)

    def _caption(self, index: int) -> str:
        colors = self._colors(index)
        first, last = (nearest_color(corner) for corner in (colors[0, 0], colors[3, 3]))
        return f"{first} at the top left and {last} at the bottom right"

    def describe(self, index: int) -> str:
        return f"synthetic image {index}"
