"""Images in files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from grpo.config import Data, UserError
from grpo.data.captions import Captions
from grpo.data.dataset import DEFAULT_SPLIT, ImageDataset
from grpo.data.folder_scan import Listing, remembered_scan, scan_folder
from grpo.data.images import read_image
from grpo.data.index_cache import cache_folder, index_file, on_main_rank

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def image_files(folder: str | Path) -> list[str]:
    """The files anywhere under a folder that are named as images are, in the order of folders, then of files."""
    listings = scan_folder(folder, suffixes=IMAGE_SUFFIXES)
    return [os.path.join(folder, place, name) for place in sorted(listings) for name in listings[place].files]


class ImageFiles(ImageDataset):
    """One file an image.

    Args:
        files: relative to `root`.
        sizes: of the files, in bytes, where they are known.
    """

    def __init__(
        self,
        files: Sequence[str],
        class_ids: Sequence[int],
        class_names: list[str],
        *,
        data: Data,
        root: str | Path = "",
        sizes: Sequence[int] = (),
        captions: Captions | None = None,
    ) -> None:
        # One array, not a million str objects: counting references would copy those into every worker's memory.
        self._files = np.array([os.fsencode(file) for file in files])
        self._root, self._sizes = os.fspath(root), np.array(sizes, dtype=np.int64)
        super().__init__(np.array(class_ids), class_names, data=data, captions=captions)

    def identify(self) -> Iterable[bytes]:
        return self._files.tobytes(), self._sizes.tobytes()

    def open(self, index: int) -> Image.Image:
        return read_image(self.describe(index))

    def describe(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._files[index]))


class ImageFolder(ImageFiles):
    """A folder with one subfolder of images for each class, in the sorted order of the folders' names.

    `data.path` holds the class folders, or holds a folder named `data.split` that does. Rank 0 looks, for all ranks;
    what it finds is kept, and a folder of a class that has not changed is not read again.
    """

    def __init__(self, *, data: Data) -> None:
        root = split_folder(data)
        cached = partial(cache_folder, data.index_cache, beside=data.place)
        listings = on_main_rank(
            lambda: remembered_scan(root, index_file(cached(), "folder", root), suffixes=IMAGE_SUFFIXES)
        )
        names = listings[""].folders
        if not names:
            raise UserError(
                f"data.path {root} has no folders: put the images of each class into a folder named after the class, "
                "or give a data set written by save_to_disk"
            )
        files, sizes, class_ids = _in_classes(listings, names)
        if not files:
            raise UserError(
                f"data.path {root} has {len(names)} folders but no images in them: files must end in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        super().__init__(files, class_ids, names, data=data, root=root, sizes=sizes)


def split_folder(data: Data) -> Path:
    """The folder in `data.path` that is named as the split, or `data.path` itself where the default is not there."""
    root = Path(data.place)
    if (root / data.split).is_dir():
        return root / data.split
    if data.split != DEFAULT_SPLIT:
        raise UserError(f"data.path {data.path} has no folder {data.split!r}: check data.split")
    return root


def _in_classes(listings: Mapping[str, Listing], names: Sequence[str]) -> tuple[list[str], list[int], list[int]]:
    """Files, relative to the root, with their sizes and the places of their classes in `names`, class by class."""
    place = {name: number for number, name in enumerate(names)}
    files, sizes, class_ids = [], [], []
    inside = sorted((place[folder.partition("/")[0]], folder) for folder in listings if folder)
    for class_id, folder in inside:
        listing = listings[folder]
        files += [f"{folder}/{name}" for name in listing.files]
        sizes += listing.sizes
        class_ids += [class_id] * len(listing.files)
    return files, sizes, class_ids
