"""Images to look at, wherever they are: an npz, a folder, a data set, or a model that draws them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from grpo.config import UserError
from grpo.data import ImageDataset
from grpo.data.images import to_pixels, to_rgb
from grpo.evaluation.distances import FeatureStatistics

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageSource(Protocol):
    """Numbered images.

    Attributes:
        class_ids: [N] int64, the class of each image, or None if they are not known.
        inception_statistics: of Inception's features over a set that the images stand for, if they come with the
            images; None has them computed from the images.
    """

    class_ids: Tensor | None
    inception_statistics: FeatureStatistics | None

    def __len__(self) -> int: ...

    def pixels(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1 as [B, 3, H, W] uint8."""


class NpzImages:
    """Images of an .npz: `arr_0` [N, H, W, 3] uint8 and, if there, the classes `arr_1` [N].

    Attributes:
        inception_statistics: `mu` [2048] and `sigma` [2048, 2048] if the file has them, as ADM's reference batches do:
            Inception's features over the whole data set, of which the images are a part. None if fewer images than the
            file's are taken.

    Raises:
        UserError: no such file, not an npz, or not such arrays.
    """

    def __init__(self, path: str | Path, *, limit: int = 0) -> None:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                images = arrays["arr_0"]
                class_ids = arrays.get("arr_1")
                moments = [arrays.get(name) for name in ("mu", "sigma")]
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist: give an .npz or a folder of images") from error
        except (BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} is not an .npz with an array arr_0: write one with recipes/generate.py") from error
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) == 0:
            raise UserError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3], N > 0")
        if class_ids is not None and class_ids.shape != images.shape[:1]:
            raise UserError(f"{path}: arr_1 has shape {list(class_ids.shape)}, expected {[len(images)]}")
        count = min(limit or len(images), len(images))
        self._images = images[:count]
        whole = count == len(images) and all(moment is not None for moment in moments)
        self.inception_statistics = (
            FeatureStatistics(*(torch.from_numpy(m).double() for m in moments)) if whole else None
        )
        self.class_ids = None if class_ids is None else torch.from_numpy(class_ids[:count].astype(np.int64))

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._images[start:stop]).permute(0, 3, 1, 2).contiguous()


class FolderImages:
    """All images under a folder, in the order of their paths; where they lie in subfolders, those are the classes.

    Images are taken as they are: neither cropped nor resized, so they must have one size.

    Raises:
        UserError: no images there, or, on reading, an image that is damaged or of another size.
    """

    inception_statistics = None

    def __init__(self, path: str | Path, *, limit: int = 0) -> None:
        root = Path(path)
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"{path} has no images ({', '.join(IMAGE_SUFFIXES)}): check the path")
        folders = [file.relative_to(root).parts[0] for file in files if file.parent != root]
        names = {name: class_id for class_id, name in enumerate(sorted(set(folders)))}
        self.class_ids = None
        if len(folders) == len(files):
            self.class_ids = torch.tensor([names[folder] for folder in folders][: limit or None])
        self._files = files[: limit or None]
        self._size: tuple[int, int] | None = None
        self._size = self._open(self._files[0]).size

    def __len__(self) -> int:
        return len(self._files)

    def pixels(self, start: int, stop: int) -> Tensor:
        return torch.stack([to_pixels(self._open(file)) for file in self._files[start:stop]])

    def _open(self, file: Path) -> Image.Image:
        try:
            with Image.open(file) as image:
                picture = to_rgb(image)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file} cannot be read as an image: repair or remove it") from error
        if self._size not in (None, picture.size):
            sizes = "{}x{}, the first image {}x{}".format(*picture.size, *self._size)
            raise UserError(f"{file} is {sizes}: images of one evaluation have one size")
        return picture


class DatasetImages:
    """The cropped images of a data set, all or the first `limit`."""

    inception_statistics = None

    def __init__(self, dataset: ImageDataset, *, limit: int = 0) -> None:
        self._dataset = dataset
        self.class_ids = torch.from_numpy(dataset.class_ids)[: limit or None]

    def __len__(self) -> int:
        return len(self.class_ids)

    def pixels(self, start: int, stop: int) -> Tensor:
        return torch.stack([self._dataset.pixels(index) for index in range(start, min(stop, len(self)))])


class DrawnImages:
    """Images that a model draws when they are asked for, so that none is kept.

    Args:
        class_ids: [N] int64, the class of each image.
        draw: (class_ids [B], row_ids [B]) -> images [B, 3, H, W] uint8 on any device; an image may depend on its class
            and its row id, which is its number, and on nothing else.
    """

    inception_statistics = None

    def __init__(self, class_ids: Tensor, draw: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.class_ids = class_ids
        self._draw = draw

    def __len__(self) -> int:
        return len(self.class_ids)

    def pixels(self, start: int, stop: int) -> Tensor:
        row_ids = torch.arange(start, min(stop, len(self)))
        return self._draw(self.class_ids[start:stop], row_ids)


def open_images(path: str | Path, *, limit: int = 0) -> ImageSource:
    """The images of a folder or an .npz; the first `limit` of them, 0 is all."""
    return FolderImages(path, limit=limit) if Path(path).is_dir() else NpzImages(path, limit=limit)


def classes_in_turn(class_ids: Sequence[int], count: int) -> Tensor:
    """[count] int64: the classes one after the other, again and again, so that their numbers differ by one at most."""
    return torch.tensor(list(class_ids))[torch.arange(count) % len(class_ids)]
