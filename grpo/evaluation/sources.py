"""Images to look at, wherever they are: an npz, a folder, a data set, or a model that draws them."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from grpo.config import Data, UserError, exists, reading, require_regular
from grpo.data import LARGEST_LABEL, ImageDataset, ImageFiles, image_files, to_pixels
from grpo.evaluation.distances import FeatureStatistics
from grpo.models import ClassCondition, Condition, as_condition
from grpo.texts import TextList

UNPACKED_BYTES, UNPACKED_TIMES = 2**30, 100
"""An array may unpack to so many bytes, or to so many times its own: zeros without an end shrink a thousandfold."""


class ImageSource:
    """Numbered images, all or the first `limit` of `count`; a subclass gives their `pixels`.

    Attributes:
        class_ids: [N] int64, the class of each image, or None if they are not known.
        inception_statistics: of Inception's features over a set that the images stand for, if they come with the
            images; None has them computed from the images.
        spatial_statistics: the same of its spatial features.
    """

    inception_statistics: FeatureStatistics | None = None
    spatial_statistics: FeatureStatistics | None = None

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

    ADM's reference batches also have `mu` [2048] and `sigma` [2048, 2048], of Inception's features over the whole data
    set, of which the images are a part, and `mu_s` and `sigma_s` of the spatial ones. They are left out where fewer
    images than the file's are taken.

    Raises:
        UserError: no such file, not an npz, or not such arrays.
    """

    def __init__(self, path: str | Path, *, limit: int = 0) -> None:
        arrays = read_npz(path, "arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s")
        if (images := arrays.pop("arr_0", None)) is None:
            raise UserError(f"{path} is not an .npz with an array arr_0: write one with `grpo generate`")
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or images.size == 0:
            raise UserError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3], N > 0")
        class_ids = arrays.get("arr_1")
        if class_ids is not None:
            if class_ids.shape != images.shape[:1]:
                raise UserError(f"{path}: arr_1 has shape {list(class_ids.shape)}, expected {[len(images)]}")
            if class_ids.dtype.kind not in "iu":
                raise UserError(f"{path}: arr_1 holds {class_ids.dtype}, expected whole numbers, the class ids")
            if class_ids.min() < 0 or class_ids.max() >= LARGEST_LABEL:
                wrong = class_ids[(class_ids < 0) | (class_ids >= LARGEST_LABEL)][0]
                raise UserError(f"{path}: arr_1 holds {wrong}, which is no class id")
        self._images = images
        labels = None if class_ids is None else torch.from_numpy(class_ids.astype(np.int64))
        super().__init__(len(images), labels, limit=limit)
        if len(self) == len(images):
            self.inception_statistics = _statistics(path, arrays, "mu", "sigma")
            self.spatial_statistics = _statistics(path, arrays, "mu_s", "sigma_s")

    def pixels(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._images[start : min(stop, len(self))]).permute(0, 3, 1, 2).contiguous()


def read_npz(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the arrays of an .npz that are there, by their names; never objects, which would be unpickled."""
    if not exists(str(path)):
        raise UserError(f"{path} does not exist: give an .npz or a folder of images")
    with reading(f"{path} is not an .npz that can be read"):
        require_regular(path)
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive, as numpy.savez writes")
        with zipfile.ZipFile(path) as packed:
            for info in packed.infolist():
                if info.file_size > max(UNPACKED_BYTES, UNPACKED_TIMES * info.compress_size):
                    raise ValueError(f"{info.filename} would unpack to {info.file_size} bytes")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive}
            if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{other[0]} is no array")
            return arrays


def _statistics(path: str | Path, arrays: dict[str, np.ndarray], *names: str) -> FeatureStatistics | None:
    """Mean and covariance of an .npz, as they are published, if they are there.

    Raises a UserError if they are not such.
    """
    if not arrays.keys() >= set(names):
        return None
    mu, sigma = (arrays[name] for name in names)
    fits = mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and mu.dtype.kind == sigma.dtype.kind == "f"
    if not fits or not (np.isfinite(mu).all() and np.isfinite(sigma).all() and (sigma.diagonal() >= 0).all()):
        found = " and ".join(f"{name} {arrays[name].dtype} {list(arrays[name].shape)}" for name in names)
        raise UserError(
            f"{path} has {found}: expected finite numbers [D] and [D, D], Inception's mean and covariance, "
            "without a variance below 0"
        )
    return FeatureStatistics(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double())


class DatasetImages(ImageSource):
    """The cropped images of a data set."""

    def __init__(self, dataset: ImageDataset, *, limit: int = 0) -> None:
        class_ids = torch.from_numpy(dataset.class_ids) if dataset.captions_of is None else None
        super().__init__(len(dataset), class_ids, limit=limit)
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
        dataset = ImageFiles([str(file) for file in files], class_ids.tolist(), names.tolist(), data=Data())
        super().__init__(dataset, limit=limit)
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
        condition: N rows, what each image is asked to be, or class ids [N]; texts may come as a list that makes rows.
        draw: (condition of B rows, row_ids [B]) -> images [B, 3, H, W] uint8 on any device; an image may depend on its
            row of the condition and its row id, which is its number, and on nothing else.
    """

    def __init__(self, condition: Condition | TextList | Tensor, draw: Callable[[Condition, Tensor], Tensor]) -> None:
        self.condition = as_condition(condition) if isinstance(condition, Tensor) else condition
        self.draw = draw
        super().__init__(self.condition.rows, getattr(self.condition, "class_ids", None))

    def pixels(self, start: int, stop: int) -> Tensor:
        return self.draw(self.condition.select(slice(start, stop)), torch.arange(start, min(stop, len(self))))


class KeptImages(ImageSource):
    """The images of another source, of which each range is taken once and kept: they may be looked at several times."""

    def __init__(self, source: ImageSource) -> None:
        super().__init__(len(source), source.class_ids)
        self.source = source
        self._kept: dict[tuple[int, int], Tensor] = {}

    def pixels(self, start: int, stop: int) -> Tensor:
        if (start, stop) not in self._kept:
            self._kept[start, stop] = self.source.pixels(start, stop)
        return self._kept[start, stop]


def open_images(path: str | Path, *, limit: int = 0) -> ImageSource:
    """The images of a folder or an .npz; the first `limit` of them, 0 is all."""
    return FolderImages(path, limit=limit) if Path(path).is_dir() else NpzImages(path, limit=limit)


def classes_in_turn(class_ids: Sequence[int], count: int) -> ClassCondition:
    """`count` rows: the classes one after the other, again and again, so that their numbers differ by one at most."""
    return ClassCondition(torch.tensor(list(class_ids))).padded(count)


def drawn_classes(
    class_ids: Sequence[int], count: int, *, order: Literal["in_turn", "random"], seed: int = 0
) -> ClassCondition:
    """`count` rows of these classes, in turn or, each by itself, at random; the first rows of a larger count."""
    if order == "in_turn":
        return classes_in_turn(class_ids, count)
    picked = np.random.Generator(np.random.Philox(seed)).integers(len(class_ids), size=count)
    return ClassCondition(torch.tensor(list(class_ids))[torch.from_numpy(picked)])


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes that share the work."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
