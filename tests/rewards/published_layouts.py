"""Small weights in published layouts and images, made by arithmetic: the same numbers wherever they are made."""

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


def noise(count: int, seed: int = 0) -> Tensor:
    """[count] int64 in 0 .. 2^32 - 1, without any generator of random numbers."""
    words = (torch.arange(count) * 2654435761 + seed) % (1 << 32)
    words = ((words ^ (words >> 15)) * 2246822519) % (1 << 32)
    return words ^ (words >> 13)


def images(count: int, side: int) -> Tensor:
    """[count, 3, side, side] uint8: noise over waves."""
    waves = torch.arange(3 * side).view(3, side, 1) * 7 + torch.arange(side) * 5
    return ((noise(count * 3 * side * side).view(count, 3, side, side) % 64 + waves) % 256).to(torch.uint8)


def counted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of these names and shapes, fp32: matrices that about halve what goes through, gains near 1."""
    weights = {}
    for name, shape in shapes.items():
        values = noise(math.prod(shape), zlib.crc32(name.encode())).double() / 2**32 - 0.5
        if len(shape) > 1:
            values = values * math.sqrt(3 / math.prod(shape[1:]))
        else:
            values = 0.2 * values + name.endswith("weight")
        weights[name] = values.view(shape).float()
    return weights


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is learned in a state dict."""
    fixed = ("attn_mask", "position_ids", "relative_position_index")
    return {name: tuple(value.shape) for name, value in weights.items() if not name.endswith(fixed)}
