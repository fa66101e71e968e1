"""Images into files: one .npz, or one PNG an image."""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from grpo.config import UserError, writing
from grpo.data import to_image
from grpo.evaluation.sources import ImageSource, rank_and_size


def batches_in_order(
    source: ImageSource, *, batch_size: int, progress: Callable[[range], Iterable[int]] = iter
) -> Iterator[Tensor]:
    """All images in their order, as batches [B, 3, H, W] uint8 on the CPU of the main rank.

    Collective: the ranks produce the batches in turns and hand them to the main one, which never holds more than one
    of each; the loop of the other ranks yields nothing. `progress` wraps the loop, to show how far it is.
    """
    rank, ranks = rank_and_size()
    for start in progress(range(0, len(source), batch_size * ranks)):
        first = start + rank * batch_size
        mine = source.pixels(first, first + batch_size).cpu() if first < len(source) else None
        batches: list[Tensor | None] | None = [mine]
        if ranks > 1:
            batches = [None] * ranks if rank == 0 else None
            dist.gather_object(mine, batches, dst=0)
        yield from (batch for batch in batches or () if batch is not None)


def make_writable(path: str | Path, *, key: str, folder: bool = False) -> None:
    """Make the folder of a file to be written, or `path` itself if it is the folder, before work is spent on it.

    Raises `UserError`, which names `key`, if nothing can be written there.
    """
    parent = Path(path) if folder else Path(path).parent
    with writing(f"{key} {path}", remedy="give another path"):
        parent.mkdir(parents=True, exist_ok=True)
        is_folder = Path(path).is_dir()  # an error for a name that is too long
        is_device = Path(path).exists() and not (is_folder or Path(path).is_file())  # a rename would replace it
    if not os.access(parent, os.W_OK):
        raise UserError(f"{key} {path} cannot be written: its folder is read-only; give another path")
    if is_folder and not folder:
        raise UserError(f"{key} {path} is a folder: give the name of a file")
    if is_device:
        raise UserError(f"{key} {path} is a device or a pipe: give the name of a file")


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a PNG, which appears when it is whole. Raises a UserError that names it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            partial.unlink(missing_ok=True)  # in a folder from elsewhere it may be a link to anything
            image.save(partial, "PNG")
            partial.replace(path)
    finally:
        with suppress(OSError):  # it was not made: its name is longer than the file's
            partial.unlink(missing_ok=True)


def save_pngs(folder: str | Path, pixels: Tensor, row_ids: Tensor) -> None:
    """Writes images [B, 3, H, W] uint8 as `folder`/000123.png, named by their row ids [B]."""
    for image, row_id in zip(pixels.cpu(), row_ids.tolist(), strict=True):
        save_image(to_image(image), Path(folder) / f"{row_id:06d}.png")


class NpzWriter:
    """Writes an .npz of images batch by batch: `arr_0` [N, H, W, 3] uint8 and `arr_1` [N] int64, the class ids, if any.

    The file appears under its name, in place of an older one, when it is complete. Uncompressed, as numpy.savez writes
    it; this is the layout that ADM's evaluation suite reads. `size` is (height, width) in pixels; `count` is N
    where there are no classes.
    """

    def __init__(
        self, path: str | Path, class_ids: Tensor | None, *, size: tuple[int, int], count: int | None = None
    ) -> None:
        assert class_ids is not None or count is not None, "one of them says how many images come"
        self.path = Path(path)
        self._missing = len(class_ids) if count is None and class_ids is not None else count or 0
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        with writing(self.path):
            self._partial.unlink(missing_ok=True)
            self._archive = zipfile.ZipFile(self._partial, "w")
            if class_ids is not None:
                with self._archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, class_ids.numpy())
            self._images = self._archive.open("arr_0.npy", "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": (self._missing, *size, 3)}
            np.lib.format.write_array_header_1_0(self._images, header)

    def write(self, pixels: Tensor) -> None:
        """Adds images [B, 3, H, W] uint8."""
        content = pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
        with writing(self.path):
            self._images.write(content)
        self._missing -= len(pixels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            with writing(self.path) if kind is None else suppress(OSError, ValueError):
                self._images.close()
                self._archive.close()
            if kind is None:
                assert self._missing == 0, f"{self._missing} images were not written"
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)
