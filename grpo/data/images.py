"""From an opened image to a square of RGB pixels."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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
    """Scale the short side to `size` and crop the centre square, as ADM and LlamaGen prepare ImageNet.

    The image is halved with a box filter while it is at least twice too large, then resized bicubically: a single
    bicubic step from a large photograph would alias.

    Args:
        image: an image of any size, at least one pixel each way.
        size: side of the result, pixels.
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


def normalize(pixels: Tensor) -> Tensor:
    """Pixels uint8 0..255 to fp32 in [-1, 1], same shape."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)
