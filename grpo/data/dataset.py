"""What every source of images has in common."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from grpo.config import Data, UserError, reason
from grpo.data.captions import Asked, Captions, Requests
from grpo.data.code_reader import CodeReader
from grpo.data.images import center_crop, to_pixels, to_rgb
from grpo.data.unreadable import UnreadableImage
from grpo.models import ClassCondition, Condition, normalize

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = Data.model_fields["split"].default

NO_PIXELS = torch.empty(3, 0, 0, dtype=torch.uint8)


def decoded(read: Callable[[], Image.Image], name: Callable[[], str]) -> Image.Image:
    """The image that `read` gives, in RGB. Raises `UnreadableImage`, which names it."""
    try:
        return to_rgb(read())
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise UnreadableImage(f"{name()} is not an image file that can be read") from error
    except (OSError, ValueError) as error:  # all that `read_image` raises
        raise UnreadableImage(f"{name()} cannot be read: {reason(error)}") from error


def sha256(*parts: bytes) -> str:
    """SHA-256 over the parts and where each of them ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


class ImageDataset(Dataset):
    """Images with class ids, each image the same on every read (no augmentation).

    A subclass says how to `open` an image, how to `describe` it in messages, and by what to `identify` all of them.

    Attributes:
        has_images: whether there are images at all; a subclass without has conditions or codes, and empty `pixels`.
        is_stream: whether images come one after the other and have no numbers; then there are no `pixels` by index.
        num_classes: of the model, where it is known.
        reads_images: whether batches need them; where codes are enough no image is opened, and batches have empty ones.
        codes: the images' codes where they are on disk, or None.
        class_ids: [N] int64 (numpy), the class of each image; as the source numbers them, then, from `build_dataset`
            on, as the model does.
        class_names: names of the classes, by class id; `build_dataset` adds numbers where the source has no names.
        captions_of: the texts of the images, where the source has texts and no classes; else None.
        requests: how samples ask for images by these texts (`build_text_dataset`); None where they ask for classes.
        source_names: of the classes as the source numbers and names them; empty where it has no names.
        remarks: what a run that trains on it should tell.
        unreadable: indices of the unreadable images met so far by this process's stream.
    """

    has_images = True
    is_stream = False

    def __init__(
        self, class_ids: np.ndarray, class_names: list[str], *, data: Data, captions: Captions | None = None
    ) -> None:
        self.data, self.captions_of = data, captions
        self.requests: Requests | None = None
        self.class_ids = np.asarray(class_ids, dtype=np.int64)
        self.class_names, self.source_names = list(class_names), tuple(class_names)
        self.unreadable: set[int] = set()
        self.remarks: list[str] = []
        self.num_classes: int | None = None
        self.reads_images = self.has_images
        self.codes: CodeReader | None = None
        self._labels = sha256(self.class_ids.tobytes(), "\0".join(self.class_names).encode("utf-8", "surrogateescape"))

    def identify(self) -> Iterable[bytes]:
        """Bytes that are others where the images are others or in another order: names and sizes of files."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> dict[str, str | int]:
        """What tells this data set from others, part by part, for what depends on it: codes, checkpoints.

        files: SHA-256 over the names, relative to the data set's folder, and sizes of the files. labels: over the
        labels and class names of the source, before they become a model's. split and image_size as in the recipe.
        """
        files = sha256(*self.identify())
        return {
            "files": files,
            "labels": self._labels,
            "split": self.data.split,
            "image_size": self.data.image_size,
        }

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
        return decoded(lambda: self.open(int(index)), lambda: self.describe(index))

    def pixels(self, index: int) -> Tensor:
        """Cropped image, [3, S, S] uint8; empty, [3, 0, 0], where there are none. Raises `UnreadableImage`."""
        if not self.has_images:
            return NO_PIXELS
        return to_pixels(center_crop(self.whole(index), self.data.image_size))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image [3, S, S] fp32 in [-1, 1] and its class id. Raises `UnreadableImage`."""
        return normalize(self.pixels(index)), int(self.class_ids[index])

    def ask(self, index: int, sample_id: int, seed: int) -> Asked | None:
        """The text of a sample, with its features; None of a class. Raises `UnreadableImage`: there are no features."""
        return None if self.requests is None else self.requests.draw(index, sample_id, seed)

    def request(self, indices: Sequence[int], asked: Sequence[Asked | None]) -> tuple[Condition, list[str]]:
        """What samples ask a generator for, and the same in words: a row and a text for each image and its `ask`."""
        if self.requests is not None:
            found = [one for one in asked if one is not None]
            assert len(found) == len(asked), "each asks in words"
            return self.requests.condition(found), [one.text for one in found]
        condition = self.condition(indices)
        return condition, self.captions(condition)

    def condition(self, indices: Sequence[int]) -> Condition:
        """The classes of the images, a row each."""
        return ClassCondition(torch.from_numpy(self.class_ids[indices]))

    def captions(self, condition: Condition) -> list[str]:
        """Classes in words, a text for each row: the class name, or nothing where the source has texts instead."""
        if self.captions_of is not None:
            return [""] * condition.rows
        assert isinstance(condition, ClassCondition), "no texts, so classes"
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
