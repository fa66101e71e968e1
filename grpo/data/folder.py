"""A folder with one subfolder of images for each class."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from grpo.config import Data, UserError
from grpo.data.dataset import DEFAULT_SPLIT, ImageDataset


class ImageFolder(ImageDataset):
    """Images of class folders; the sorted folder names are the classes.

    `data.path` holds the class folders, or holds a folder named `data.split` that does.
    """

    def __init__(self, *, data: Data) -> None:
        root = Path(data.path)
        if (root / data.split).is_dir():
            root = root / data.split
        elif data.split != DEFAULT_SPLIT:
            raise UserError(f"data.path {data.path} has no folder {data.split!r}: check data.split")
        class_names = sorted(
            entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
        )
        if not class_names:
            raise UserError(
                f"data.path {root} has no folders: put the images of each class into a folder named after the class, "
                "or give a data set written by save_to_disk"
            )
        samples = make_dataset(
            root, {name: class_id for class_id, name in enumerate(class_names)}, IMG_EXTENSIONS, allow_empty=True
        )
        if not samples:
            raise UserError(
                f"data.path {root} has {len(class_names)} folders but no images in them: files must end in "
                f"{', '.join(IMG_EXTENSIONS)}"
            )
        files, class_ids = zip(*samples, strict=True)
        # One array, not a million str objects: counting references would copy those into every worker's memory.
        self._files = np.array([os.fsencode(file) for file in files])
        super().__init__(np.array(class_ids), class_names, data=data)

    def open(self, index: int) -> Image.Image:
        with open(self._files[index], "rb") as file:
            image = Image.open(file)
            image.load()
        return image

    def describe(self, index: int) -> str:
        return os.fsdecode(self._files[index])
