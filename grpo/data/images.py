"""From an opened image to a square of RGB pixels."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def read_image(file: str | Path | BinaryIO) -> Image.Image:
    """The decoded image of a file, any mode and size; the file is closed. Errors of the decoder pass through."""
    with Image.open(file) as image:
        image.load()
        return image.copy()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image mode to 8-bit RGB; alpha is dropped, 16-bit grey is scaled.

    Pillow's own conversion of 16-bit grey clips everything above 255 to white.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
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
