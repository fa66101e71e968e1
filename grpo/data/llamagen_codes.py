"""Codes as LlamaGen's `extract_codes_c2i.py` writes them: one .npy an image."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from grpo.config import Data, UserError
from grpo.data.code_reader import CodeReader, read_array
from grpo.data.dataset import UnreadableImage
from grpo.data.folder_scan import Listing, scan_folder
from grpo.data.index_cache import cache_folder, index_file, on_main_rank, read_index, write_index


class LlamaGenCodes(CodeReader):
    """Folders `NAME_codes` with `0.npy`, `1.npy`, ... [1, A, T] or [A, T], and `NAME_labels` with labels alike.

    Where several sizes lie side by side, NAME ends in data.image_size. Nothing tells from which images and by which
    tokenizer the codes were made.

    Raises:
        UserError: no such folders, numbers that are missing, or a file that is not codes.
    """

    def __init__(self, data: Data) -> None:
        self.path, labels = _folders(Path(data.place), data.image_size)
        self.labels = on_main_rank(partial(_labels, data, self.path, labels))
        self.class_names = []
        self.variants, self.length = self._load(0).shape
        self.plain_first = self.variants <= 2  # itself and its mirror image; more are crops

    def __str__(self) -> str:
        return str(self.path)

    def _load(self, index: int) -> np.ndarray:
        """[A, T]."""
        codes = read_array(self.path / f"{index}.npy")
        codes = codes[0] if codes.ndim == 3 and len(codes) == 1 else codes
        if codes.ndim != 2 or not codes.size or (index and codes.shape != (self.variants, self.length)):
            raise UnreadableImage(f"{self.path / f'{index}.npy'} has shape {list(codes.shape)}: not the others'")
        return codes

    def row(self, index: int, variant: int) -> np.ndarray:
        return self._load(index)[variant]

    def identify(self) -> Sequence[bytes]:
        """For the fingerprint of a data set that has nothing but these codes."""
        return str(len(self.labels)).encode(), self._load(0).tobytes()


def _folders(root: Path, image_size: int) -> tuple[Path, Path]:
    """Folders of codes and labels."""
    pairs = {
        folder: folder.with_name(f"{folder.name.removesuffix('codes')}labels")
        for folder in sorted(root.iterdir() if root.is_dir() else ())
        if re.search(r"(^|_)codes$", folder.name)
    }
    pairs = {codes: labels for codes, labels in pairs.items() if codes.is_dir() and labels.is_dir()}
    of_size = {codes: labels for codes, labels in pairs.items() if codes.name.endswith(f"{image_size}_codes")}
    chosen = of_size or pairs
    if len(chosen) != 1:
        raise UserError(
            f"data.path {root} has no codes.json, as `grpo encode` writes it, and not one pair of folders NAME_codes "
            f"and NAME_labels, as LlamaGen does (found {len(chosen)}): give the folder of codes"
        )
    return next(iter(chosen.items()))


def _labels(data: Data, codes: Path, folder: Path) -> np.ndarray:
    """Labels [N] int64, of a million files read once."""
    listings = [scan_folder(place, suffixes=(".npy",))[""] for place in (codes, folder)]
    for place, listing in zip((codes, folder), listings, strict=True):
        _check_numbers(place, listing, len(listings[0].files))
    count = len(listings[0].files)
    index = index_file(cache_folder(data.index_cache, folder), "labels", folder)
    state = np.array([listing.changed for listing in listings])
    known = read_index(index, ("state", "labels"))
    if known is not None and state.all() and np.array_equal(known["state"], state) and len(known["labels"]) == count:
        return known["labels"].astype(np.int64)
    labels = np.array([_label(folder / f"{number}.npy") for number in range(count)], dtype=np.int64)
    write_index(index, {"state": state, "labels": labels})
    return labels


def _check_numbers(folder: Path, listing: Listing, count: int) -> None:
    names = set(listing.files)
    missing = next((number for number in range(max(count, 1)) if f"{number}.npy" not in names), None)
    if missing is not None:
        raise UserError(f"{folder} has no {missing}.npy: its files are numbered from 0 on")
    if len(names) != count:
        raise UserError(f"{folder} has {len(names)} files for {count} images: codes and labels belong together")


def _label(file: Path) -> int:
    label = read_array(file)
    if label.size != 1:
        raise UserError(f"{file} has shape {list(label.shape)}: one label is expected")
    if (value := int(label.reshape(-1)[0])) >= 2**63:
        raise UserError(f"{file} holds {value}, which is no label")
    return value
