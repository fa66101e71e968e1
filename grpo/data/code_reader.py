"""What every source of codes on disk has in common."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo.config import UserError, reason, require_regular
from grpo.data.unreadable import UnreadableImage


class CodeReader:
    """A variants of the codes of each image of a data set; indices are the data set's.

    A subclass says how to read a `row`, by what to `identify` all of them, and has

        labels: [N] int64, as the source numbers its classes, whose names are `class_names`, if it has names.
        variants, length: A and T.
        plain_first: whether the first variant is the image as it is, not a crop or its mirror image.
    """

    labels: np.ndarray
    class_names: list[str]
    variants: int
    length: int
    plain_first: bool
    codebook_size: int | None = None
    _drawn: int | None = None

    def identify(self) -> Sequence[bytes]:
        """Bytes that are others where the codes are others."""
        raise NotImplementedError

    def row(self, index: int, variant: int) -> np.ndarray:
        """Codes [T] of any integer type. Raises `UnreadableImage`."""
        raise NotImplementedError

    def only_plain(self) -> None:
        """Draw the image as it is from now on. Raises a UserError where it was not encoded."""
        if not self.plain_first:
            raise UserError(
                f"{self} holds codes of {self.variants} crops, and none of the images as they are, which this job "
                "needs: encode them with encode.augmentation none or flip"
            )
        self._drawn = 1

    def draw(self, index: int, sample_id: int, seed: int) -> np.ndarray:
        """Codes [T] int64 of one variant, all equally likely: a function of the seed and the sample's number.

        Raises `UnreadableImage`.
        """
        count, variant = self._drawn or self.variants, 0
        if count > 1:
            variant = int(np.random.default_rng((seed, sample_id, 1)).integers(count))
        codes = self.row(index, variant).astype(np.int64)
        if codes.min() < 0 or (self.codebook_size is not None and codes.max() >= self.codebook_size):
            size = self.codebook_size
            limits = "below 0" if size is None else f"not all in 0..{size - 1}"
            raise UnreadableImage(f"codes of image {index} of {self} are {limits}")
        return codes


def read_array(file: Path, *, mapped: bool = False) -> np.ndarray:
    """An .npy of whole numbers, read or memory-mapped. Raises `UnreadableImage`."""
    try:
        require_regular(file)
        with open(file, "rb") as opened:
            if opened.read(6) != b"\x93NUMPY":  # numpy would open an archive too
                raise ValueError("it is no .npy")
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # a header is a Python expression of a few kinds
        raise UnreadableImage(f"{file} cannot be read: {reason(error)}") from error
    if array.dtype.kind not in "iu":
        raise UnreadableImage(f"{file} holds {array.dtype}, not whole numbers")
    return array
