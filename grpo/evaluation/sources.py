"""Images to look at, wherever they are: an npz, a folder, a data set, or a model that draws them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from grpo.config import Data, UserError
from grpo.data import ImageDataset, ImageFiles, image_files, to_pixels
from grpo.evaluation.distances import FeatureStatistics
from grpo.models import ClassCondition, Condition, as_condition


class ImageSource:
    """Numbered images, all or the first `limit` of `count`; a subclass gives their `pixels`.

    Attributes:
        class_ids: [N] int64, the class of each image, or None if they are not known.
        inception_statistics: of Inception's features over a set that the images stand for, if they come with the
            images; None has them computed from the images.
    """

    inception_statistics: FeatureStatistics | None = None

    def __init__(self, count: int, class_ids: Tensor | None, *, limit: int = 0) -> None:
        self._count = min(limit or count, count)
        self.class_ids = None if class_ids is None else class_ids[: self._count]

    def __len__(self) -> int:
        return self._count

    def pixels(self, start: int, stop: int) -> Tensor:
        """Images start .. stop - 1, as far as there are any, as [B, 3, H, W] uint8."""
        raise NotImplementedError


class NpzImages(ImageSource):
    """Images of an .npz: `arr_0` [N, H, W, 3] uint8 and, if there, the classes `arr_1` [N].

    ADM's reference batches also have `mu` [2048] and `sigma` [2048, 2048]: Inception's features over the whole data
    set, of which the images are a part. They are left out where fewer images than the file's are taken.

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
            raise UserError(f"{path} is not an .npz with an array arr_0: write one with `grpo generate`") from error
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) == 0:
            raise UserError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3], N > 0")
        if class_ids is not None and class_ids.shape != images.shape[:1]:
            raise UserError(f"{path}: arr_1 has shape {list(class_ids.shape)}, expected {[len(images)]}")
        self._images = images
        class_ids = None if class_ids is None else torch.from_numpy(class_ids.astype(np.int64))
        super().__init__(len(images), class_ids, limit=limit)
        if len(self) == len(images) and all(moment is not None for moment in moments):
            self.inception_statistics = FeatureStatistics(*(torch.from_numpy(moment).double() for moment in moments))

    def pixels(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._images[start : min(stop, len(self))]).permute(0, 3, 1, 2).contiguous()


class DatasetImages(ImageSource):
    """The cropped images of a data set."""

    def __init__(self, dataset: ImageDataset, *, limit: int = 0) -> None:
        super().__init__(len(dataset), torch.from_numpy(dataset.class_ids), limit=limit)
        self._dataset = dataset

    def pixels(self, start: int, stop: int) -> Tensor:
        return torch.stack([self.image(index) for index in range(start, min(stop, len(self)))])

    def image(self, index: int) -> Tensor:
        """[3, H, W] uint8."""
        return self._dataset.pixels(index)


class FolderImages(DatasetImages):
    """All images under a folder, in the order of their paths; where they lie in subfolders, those are the classes.

    Images are taken as they are: neither cropped nor resized, so they must have one size.

    Raises:
        UserError: no images there, or, on reading, an image that is damaged or of another size.
    """

    def __init__(self, path: str | Path, *, limit: int = 0) -> None:
        files = sorted(Path(file) for file in image_files(path))
        if not files:
            raise UserError(f"{path} has no images: check the path")
        folders = [file.relative_to(path).parts[0] for file in files]
        names, class_ids = np.unique(folders, return_inverse=True)
        super().__init__(ImageFiles(files, class_ids, names.tolist(), data=Data()), limit=limit)
        if any(file.parent == Path(path) for file in files):
            self.class_ids = None
        self._size = self._dataset.whole(0).size

    def image(self, index: int) -> Tensor:
        image = self._dataset.whole(index)
        if image.size != self._size:
            sizes = "{}x{}, the first image {}x{}".format(*image.size, *self._size)
            raise UserError(f"{self._dataset.describe(index)} is {sizes}: images of one evaluation have one size")
        return to_pixels(image)


class DrawnImages(ImageSource):
    """Images that a model draws when they are asked for, so that none is kept.

    Args:
        condition: N rows, what each image is asked to be, or class ids [N].
        draw: (condition of B rows, row_ids [B]) -> images [B, 3, H, W] uint8 on any device; an image may depend on its
            row of the condition and its row id, which is its number, and on nothing else.
    """

    def __init__(self, condition: Condition | Tensor, draw: Callable[[Condition, Tensor], Tensor]) -> None:
        self.condition, self.draw = as_condition(condition), draw
        super().__init__(self.condition.rows, getattr(self.condition, "class_ids", None))

    def pixels(self, start: int, stop: int) -> Tensor:
        return self.draw(self.condition.select(slice(start, stop)), torch.arange(start, min(stop, len(self))))


def open_images(path: str | Path, *, limit: int = 0) -> ImageSource:
    """The images of a folder or an .npz; the first `limit` of them, 0 is all."""
    return FolderImages(path, limit=limit) if Path(path).is_dir() else NpzImages(path, limit=limit)


def classes_in_turn(class_ids: Sequence[int], count: int) -> ClassCondition:
    """`count` rows: the classes one after the other, again and again, so that their numbers differ by one at most."""
    return ClassCondition(torch.tensor(list(class_ids))).padded(count)


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes that share the work."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
