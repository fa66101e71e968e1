"""Between pixels and the values that networks take."""

import torch
from torch import Tensor


def normalize(pixels: Tensor) -> Tensor:
    """Pixels uint8 0..255 to fp32 in [-1, 1], same shape."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest of 0..255, uint8 of the same shape; values outside are clamped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
