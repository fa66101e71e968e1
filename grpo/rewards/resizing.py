"""Resizing as Pillow does it, on the GPU and in batches: networks were trained on images that went through it."""

from torch import Tensor


def resize_as_pillow(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels [n, C, H, W] fp32 of whole levels 0..255 -> [n, C, height, width] likewise, bicubic with antialias.

    One side is resized after the other and both results have 8 bits. Pillow's fixed point differs by a level of 255
    (from 384 to 224 pixels in 1 of 5,000 numbers, from 256 in 1 of 500, there rarely by two).
    """
    # here, since most networks resize nothing, and a machine without torchvision runs those
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as TF

    for shape in ([pixels.shape[-2], width], [height, width]):
        pixels = TF.resize(pixels, shape, InterpolationMode.BICUBIC, antialias=True).round().clamp(0, 255)
    return pixels
