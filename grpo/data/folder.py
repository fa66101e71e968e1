"""Images in files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from grpo.config import Data, UserError
from grpo.data.dataset import DEFAULT_SPLIT, ImageDataset
from grpo.data.images import read_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def image_files(folder: str | Path) -> list[str]:
    """The files anywhere under a folder that are named as images are, in the order of folders, then of files.

    Links to folders are followed, after all folders that are there themselves; no folder is looked at twice.
    """
    found: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [os.fspath(folder)], []
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append((path, entry.name))
    return [os.path.join(*names) for names in sorted(found)]


class ImageFiles(ImageDataset):
    """One file an image."""

    def __init__(self, files: Sequence[str], class_ids: Sequence[int], class_names: list[str], *, data: Data) -> None:
        # One array, not a million str objects: counting references would copy those into every worker's memory.
        self._files = np.array([os.fsencode(file) for file in files])
        super().__init__(np.array(class_ids), class_names, data=data)

    def open(self, index: int) -> Image.Image:
        return read_image(os.fsdecode(self._files[index]))

    def describe(self, index: int) -> str:
        return os.fsdecode(self._files[index])


class ImageFolder(ImageFiles):
    """A folder with one subfolder of images for each class, in the sorted order of the folders' names.

    `data.path` holds the class folders, or holds a folder named `data.split` that does.
    """

    def __init__(self, *, data: Data) -> None:
        root = Path(data.path)
        if (root / data.split).is_dir():
            root = root / data.split
        elif data.split != DEFAULT_SPLIT:
            raise UserError(f"data.path {data.path} has no folder {data.split!r}: check data.split")
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise UserError(
                f"data.path {root} has no folders: put the images of each class into a folder named after the class, "
                "or give a data set written by save_to_disk"
            )
        files = [image_files(root / name) for name in names]
        if not any(files):
            raise UserError(
                f"data.path {root} has {len(names)} folders but no images in them: files must end in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        class_ids = np.repeat(np.arange(len(names)), [len(of_class) for of_class in files])
        super().__init__([file for of_class in files for file in of_class], class_ids, names, data=data)
