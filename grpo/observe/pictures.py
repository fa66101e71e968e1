"""Pictures inside of a page: as data URLs, images of the same request beside each other, strips under each other."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from grpo.observe.grids import GAP, picture_of

LARGE_BYTES = 200_000  # a picture of more is packed with some loss
FEW_PIXELS = 64 * 64  # of which none is to be lost
WIDEST = 1600  # pixels of a picture that is packed
SMALL_SIDE = 48  # images of fewer pixels are shown enlarged, pixel by pixel


class Gallery(NamedTuple):
    """Images of the same requests and random numbers, those of one request beside each other.

    names  what each image of an item is of, in their order
    items  (caption, data URLs) of each request; the caption may be empty
    """

    title: str
    names: list[str]
    items: list[tuple[str, list[str]]]
    small: bool
    folded: bool = False


class Strips(NamedTuple):
    """Pictures of equal widths under each other, each with its text: what is in one column belongs together."""

    title: str
    rows: list[tuple[str, str]]  # label, data URL
    small: bool


def gallery(
    title: str, grids: Mapping[str, Path], *, side: int, captions: Sequence[str], folded: bool = False
) -> Gallery:
    """The first images of each picture that `image_grid` made of images of `side` x `side` pixels.

    Args:
        grids: what the images are of -> the picture, the same requests in all of them.
        captions: what was asked for, as many as are to be shown.
    """
    cut = [tiles(picture_of(path), side) for path in grids.values()]
    items = [(caption, [_packed(image) for image in images]) for caption, *images in zip(captions, *cut, strict=False)]
    return Gallery(title, list(grids), items, side < SMALL_SIDE, folded)


def strips(title: str, pictures: Sequence[tuple[str, Path]]) -> Strips | None:
    """(label, PNG) pairs; None where there are none."""
    rows = [(label, data_url(path)) for label, path in pictures]
    return Strips(title, rows, is_small(pictures[0][1])) if rows else None


def tiles(grid: Image.Image, side: int) -> Iterator[Image.Image]:
    """The images of a grid, row by row."""
    step = side + GAP
    for top in range(0, grid.height, step):
        for left in range(0, grid.width, step):
            yield grid.crop((left, top, left + side, top + side))


def is_small(path: Path) -> bool:
    """Whether a strip or grid is of images so small that they are to be seen enlarged."""
    return picture_of(path).height < SMALL_SIDE


def data_url(path: Path) -> str:
    """A picture as it is, or packed with some loss if its file is large; an empty one where that holds none."""
    return _data_url(path, path.lstat().st_mtime_ns)


@lru_cache(maxsize=64)  # a run writes its page again and again, and packing takes a moment
def _data_url(path: Path, changed: int) -> str:
    picture = picture_of(path)  # decoded first: a page must not carry away what a link of that name leads to
    return _packed(picture, few_bytes=path.is_file() and path.stat().st_size <= LARGE_BYTES)


def _packed(image: Image.Image, *, few_bytes: bool = False) -> str:
    """An image as PNG if it has few pixels or bytes, else as WebP, at most as wide as a page."""
    buffer, kind = BytesIO(), "png" if few_bytes or image.width * image.height <= FEW_PIXELS else "webp"
    if kind == "webp":
        image.thumbnail((WIDEST, 4 * WIDEST))
    image.save(buffer, format=kind, **({"quality": 85, "method": 2} if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
