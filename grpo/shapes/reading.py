"""Read a picture by a network: a small convolutional one, with a head for each attribute at every place of a grid.

It knows shapes as centres (Zhou et al., arXiv 1904.07850): a map of how near a cell is to a shape's centre, and in each
cell the shape, the colour, the radius and the centre of what is there. It is trained on drawings (`reading_loss`).
"""

import os
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.config import UserError
from grpo.formats import read_weights, require_finite
from grpo.models.classifier import Stage
from grpo.shapes.world import COLORS, MOST_SEEN, NO, SHAPES, Scenes

READING_SIZE = 32  # side of the images that it looks at; others are resized
HALVINGS = 2
SPREAD = 0.8  # standard deviation of the map around a centre, cells
NEAR = 1.2  # cells around a centre that know its shape's attributes
THERE = 0.4  # of the map, from which on a peak is a shape
RADIUS_SCALE = 10.0  # radii and offsets are learned in this many of their units
PARTS = (1, len(SHAPES), len(COLORS), 1, 2)  # centre map, shape, colour, radius, offset x and y


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """Sizes of a reader."""

    width: int = 32  # channels of the first stage, a multiple of 8; the next has twice as many

    def __post_init__(self) -> None:
        if self.width % 8:
            raise ValueError(f"width {self.width} must be a multiple of 8")


class Look(nn.Module):
    """Adds what three by three neighbours say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.norm(self.conv(x)))


class Reader(nn.Module):
    """Images [N, 3, H, W] in [-1, 1], square, of any size -> maps [N, 18, 8, 8], see `PARTS`."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        widths = [3, config.width, 2 * config.width]
        self.layers = nn.Sequential(*(Stage(*pair) for pair in pairwise(widths)))
        self.looks = nn.Sequential(Look(widths[-1]), Look(widths[-1]))
        self.head = nn.Conv2d(widths[-1], sum(PARTS), kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images))

    def maps(self, images: Tensor) -> Tensor:
        """What the heads decide on, [N, 2 width, 8, 8]."""
        if images.shape[-1] != READING_SIZE:
            mode = "area" if images.shape[-1] > READING_SIZE else "bilinear"
            images = F.interpolate(images, size=(READING_SIZE, READING_SIZE), mode=mode)
        return self.looks(self.layers(images))

    def features(self, images: Tensor) -> Tensor:
        """[N, 2 width], the mean over the image."""
        return self.maps(images).mean((2, 3))

    def shape_logits(self, images: Tensor) -> Tensor:
        """[N, 6], of the shapes, the mean over the image by how near to a centre each cell is."""
        there, shapes, *_ = self(images).split(PARTS, dim=1)
        near = there.sigmoid()
        return (near * shapes).sum((2, 3)) / near.sum((2, 3))

    @torch.no_grad()
    def read(self, images: Tensor) -> Scenes:
        """What they show, at most `MOST_SEEN` shapes each."""
        return scenes_of(self(images.clamp(-1, 1)).float())


def cells(maps: int, device: torch.device | str) -> Tensor:
    """[maps, maps, 2] middles of a grid's cells, x and y in shares of the side."""
    middles = (torch.arange(maps, device=device) + 0.5) / maps
    return torch.stack(torch.meshgrid(middles, middles, indexing="xy"), -1)


def reading_loss(outputs: Tensor, scenes: Scenes) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of maps [N, 18, G, G] against what was drawn, and how often shape and colour are right near a centre."""
    there, shapes, colors, radii, offsets = outputs.split(PARTS, dim=1)
    grid, size = cells(outputs.shape[-1], outputs.device), outputs.shape[-1]
    apart = scenes.centers[:, :, None, None] - grid  # [N, K, G, G, 2]
    distance = apart.norm(dim=-1).masked_fill(~scenes.present[:, :, None, None], float("inf")) * size
    nearest, which = distance.min(1)  # [N, G, G]
    wanted = torch.exp(-nearest.square() / (2 * SPREAD**2))
    found = F.binary_cross_entropy_with_logits(there[:, 0], wanted) - F.binary_cross_entropy(wanted, wanted)
    near = (nearest < NEAR).nonzero(as_tuple=True)
    row, slot = near[0], which[near]

    def at(values: Tensor) -> Tensor:
        return values[near[0], :, near[1], near[2]]  # [n, C]

    shape, color = (
        F.cross_entropy(at(shapes), scenes.shapes[row, slot]),
        F.cross_entropy(at(colors), scenes.colors[row, slot]),
    )
    away = apart[near[0], slot, near[1], near[2]] * RADIUS_SCALE
    geometry = F.l1_loss(at(radii)[:, 0], scenes.radii[row, slot] * RADIUS_SCALE) + F.l1_loss(at(offsets), away)
    right = {
        "shape": at(shapes).argmax(1) == scenes.shapes[row, slot],
        "color": at(colors).argmax(1) == scenes.colors[row, slot],
    }
    means = {name: values.double().mean() for name, values in right.items()}
    return 10 * found + shape + color + geometry, means


def scenes_of(outputs: Tensor) -> Scenes:
    """The scenes that maps [N, 18, G, G] show: the highest peaks of the centre map, at most `MOST_SEEN`."""
    there, shapes, colors, radii, offsets = outputs.split(PARTS, dim=1)
    heights = there[:, 0].sigmoid()
    peaks = heights.masked_fill(heights < F.max_pool2d(heights, 3, stride=1, padding=1), 0)
    best, place = peaks.flatten(1).topk(MOST_SEEN)  # [N, K]
    is_there = best > THERE

    def at(values: Tensor) -> Tensor:
        flat = values.flatten(2)  # [N, C, G²]
        return flat.gather(2, place[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)  # [N, K, C]

    centers = cells(outputs.shape[-1], outputs.device).flatten(0, 1)[place] + at(offsets) / RADIUS_SCALE
    return Scenes(
        shapes=at(shapes).argmax(-1).masked_fill(~is_there, NO),
        colors=at(colors).argmax(-1).masked_fill(~is_there, NO),
        radii=(at(radii)[..., 0] / RADIUS_SCALE).clamp_min(1e-3) * is_there,
        centers=centers * is_there[..., None],
    )


def load_reader(path: str | os.PathLike[str]) -> Reader:
    """The reader that the job `grpo reader` wrote, in eval mode; its sizes show in its weights.

    Takes any layout of `read_weights`. Raises a UserError if there is none, or it is not that of a reader.
    """
    weights = read_weights(path)
    require_finite(path, weights)
    try:
        with torch.device("meta"):
            reader = Reader(ReaderConfig(width=len(weights["layers.0.conv1.weight"])))
        reader.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a reader of shapes; train one with grpo reader") from error
    return reader.eval()
