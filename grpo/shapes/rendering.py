"""The renderer: scenes to anti-aliased pixels, at any resolution."""

import torch
from torch import Tensor

from grpo.shapes.world import BACKGROUND, COLORS, SHAPES, Scenes

TRIANGLE = (1.0, 0.75, 1.04)  # half width, depth of its base below the centre, height of its tip above it
SQUARE, DIAMOND = 0.86, 1.06  # half side; half diagonal
CROSS, RING = 0.3, (0.72, 0.27)  # half width of an arm; middle radius and half width of the band
EXTENT = 1.07  # no shape reaches farther than so many radii from its centre, along x or y


def distances(shape: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the shape's edge, in radii: below 0 inside. x, y from its centre, in radii.

    Exact near straight edges and round ones; beyond a corner it is at most too small, which rounds no corner.
    """
    name = SHAPES[shape]
    if name == "circle":
        return torch.hypot(x, y) - 1
    if name == "ring":
        return (torch.hypot(x, y) - RING[0]).abs() - RING[1]
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE
    if name == "diamond":
        return (x.abs() + y.abs() - DIAMOND) * 0.5**0.5
    if name == "cross":
        along, across = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(along - 1, across - CROSS)
    half, base, tip = TRIANGLE
    slope = half / (base + tip)
    side = (x.abs() - slope * (y + tip)) / (1 + slope**2) ** 0.5
    return torch.maximum(side, y - base)


def coverage(shape: int, x: Tensor, y: Tensor, radii: Tensor, pixel: float) -> Tensor:
    """Share of each pixel that the shape covers, in [0, 1].

    Args:
        x, y: of the pixels' middles from the shape's centre, in shares of the side.
        radii: in shares of the side, of a shape that x and y broadcast with.
        pixel: side of a pixel, in shares of the side.
    """
    return (0.5 - distances(shape, x / radii, y / radii) * radii / pixel).clamp(0, 1)


def palette(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The colours [8, 3] and the background [3], fp32 in [0, 1]."""
    colors, background = torch.tensor(list(COLORS.values())), torch.tensor(BACKGROUND)
    return colors.to(device) / 255, background.to(device) / 255


def middles(size: int, device: torch.device | str = "cpu") -> Tensor:
    """[size] the middles of a row's pixels, in shares of the side."""
    return (torch.arange(size, device=device) + 0.5) / size


def render(scenes: Scenes, image_size: int) -> Tensor:
    """Scenes to images [N, 3, S, S] uint8."""
    device = scenes.radii.device
    colors, background = palette(device)
    images = background.view(3, 1, 1).repeat(len(scenes.radii), 1, image_size, image_size)
    grid = middles(image_size, device)
    for shape in range(len(SHAPES)):
        rows, slots = torch.nonzero(scenes.present & (scenes.shapes == shape), as_tuple=True)
        if not len(rows):
            continue
        x, y = scenes.centers[rows, slots].unbind(-1)
        x, y = torch.broadcast_tensors(grid - x[:, None, None], grid[:, None] - y[:, None, None])  # [n, S, S]
        share = coverage(shape, x, y, scenes.radii[rows, slots, None, None], 1 / image_size)
        paint = share[:, None] * (colors[scenes.colors[rows, slots]] - background)[:, :, None, None]
        images.index_add_(0, rows, paint)  # shapes do not overlap
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
