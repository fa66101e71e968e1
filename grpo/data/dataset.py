"""What every source of images has in common."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from grpo.config import Data, UserError, reason
from grpo.data.images import center_crop, to_pixels, to_rgb
from grpo.models import ClassCondition, Condition, normalize

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = Data.model_fields["split"].default


class UnreadableImage(UserError):
    """One image that is missing or damaged."""


class ImageDataset(Dataset):
    """Images with class ids, each image the same on every read (no augmentation).

    A subclass says how to `open` an image and how to `describe` it in messages.

    Attributes:
        has_images: whether there are images at all; a subclass without has conditions only, and empty `pixels`.
        class_ids: [N] int64 (numpy), the class of each image; as the source numbers them, then, from `build_dataset`
            on, as the model does.
        class_names: names of the classes, by class id; `build_dataset` adds numbers where the source has no names.
        unreadable: indices of the unreadable images met so far by this process's stream.
    """

    has_images = True

    def __init__(self, class_ids: np.ndarray, class_names: list[str], *, data: Data) -> None:
        self.data = data
        self.class_ids = np.asarray(class_ids, dtype=np.int64)
        self.class_names = list(class_names)
        self.unreadable: set[int] = set()

    def open(self, index: int) -> Image.Image:
        """The image as stored, any mode and size, by `read_image`, whose errors pass through."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Name of the image for messages: its file, or its place in the data set."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.class_ids)

    def whole(self, index: int) -> Image.Image:
        """The image as stored, in RGB. Raises `UnreadableImage`."""
        try:
            return to_rgb(self.open(int(index)))
        except UnidentifiedImageError as error:  # its text holds a memory address
            raise UnreadableImage(f"{self.describe(index)} is not an image file that can be read") from error
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"{self.describe(index)} cannot be read: {reason(error)}") from error

    def pixels(self, index: int) -> Tensor:
        """Cropped image, [3, S, S] uint8. Raises `UnreadableImage`."""
        return to_pixels(center_crop(self.whole(index), self.data.image_size))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image [3, S, S] fp32 in [-1, 1] and its class id. Raises `UnreadableImage`."""
        return normalize(self.pixels(index)), int(self.class_ids[index])

    def condition(self, indices: Sequence[int]) -> Condition:
        """What the images ask a generator for, a row each."""
        return ClassCondition(torch.from_numpy(self.class_ids[indices]))

    def captions(self, condition: Condition) -> list[str]:
        """A condition of this data set in words, a text for each row: the class name."""
        return [self.class_names[class_id] for class_id in condition.class_ids.tolist()]

    def record_unreadable(self, index: int, reason: str) -> None:
        """Name and count an unreadable image. Raises `UserError` beyond the limit."""
        if index in self.unreadable:
            return
        self.unreadable.add(index)
        count, most = len(self.unreadable), self.data.max_bad_images
        if count > most:
            raise UserError(
                f"{count} unreadable images, more than data.max_bad_images = {most}; the last: {reason}; "
                "repair or remove them, or raise data.max_bad_images"
            )
        logger.warning("%s; the next image takes its place (%d so far)", reason, count)
