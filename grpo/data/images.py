"""From an opened image to a square of RGB pixels."""

import warnings
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grpo.config import reason, require_regular

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What is decoded, by what a file holds and not by its name. Pillow knows others, and starts programs for some."""

LARGEST_AREA = 2**27  # pixels, half a gigabyte decoded
LARGEST_ASPECT = 100
MOST_SCANS = 200
"""Of a progressive JPEG, besides bytes that look like one: each passes over all pixels, for 20 bytes of a file."""
_EIGHT_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # looked up, in a quarter of the memory


def read_image(file: str | Path | BinaryIO) -> Image.Image:
    """The decoded image of a file, any mode and size; the file is closed.

    Raises an OSError or a ValueError: it is not there, is a pipe or a device, is in none of `FORMATS` (Pillow's
    UnidentifiedImageError), is damaged, or says that it is larger or longer than an image is, which is found before it
    is decoded.
    """
    if isinstance(file, str | Path):
        require_regular(file)
    try:
        # Whatever Pillow warns of, such as odd metadata, the image is read or is not.
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
            _check_size(*image.size)
            if image.info.get("progressive") and image.fp is not None:
                _check_scans(image.fp)
            image.load()
            return image.copy()
    except (OSError, ValueError):
        raise
    except Exception as error:  # a decoder that meets bytes that it did not expect
        raise ValueError(reason(error)) from error


def _check_size(width: int, height: int) -> None:
    """Raise a ValueError for an image whose pixels, or whose pixels scaled to a crop, would fill the memory."""
    if width * height > LARGEST_AREA:
        raise ValueError(f"it has {width} x {height} pixels, more than {LARGEST_AREA:,}")
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise ValueError(f"it has {width} x {height} pixels, a side more than {LARGEST_ASPECT} times the other")


def _check_scans(file: IO[bytes]) -> None:
    """Raise a ValueError for a progressive JPEG that would be decoded for hours; ten scans are usual."""
    place, scans, size = file.tell(), 0, 0
    file.seek(0)
    while block := file.read(2**20):
        scans, size = scans + block.count(b"\xff\xda"), size + len(block)
    file.seek(place)
    if scans > MOST_SCANS + size // 2**16:
        raise ValueError(f"it is a progressive JPEG of {scans} scans, more than {MOST_SCANS}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image mode to 8-bit RGB; alpha is dropped, 16-bit grey is scaled.

    Pillow's own conversion of 16-bit grey clips everything above 255 to white.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.asarray(image)
        gray = gray if gray.dtype == np.uint16 else gray.clip(0, 65535).astype(np.uint16)
        image = Image.fromarray(_EIGHT_BITS[gray])
    elif image.mode == "P":
        image = image.convert("RGBA")  # the palette's transparency has no direct way to RGB
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side to `size` pixels and crop the centre square, as ADM and LlamaGen prepare ImageNet.

    The image is halved with a box filter while it is at least twice too large, then resized bicubically: a single
    bicubic step from a large photograph would alias.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image to pixels [3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] uint8, on any device, to an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
