"""The world of shapes: what there is, and how it looks.

A scene is a dark square with one to four shapes that do not touch. Lengths are shares of the square's side, x runs to
the right and y down. Everything that can be said of a scene (`Request`) is one of the words below, and everything is
exact: a scene is drawn from numbers, so what it shows is known.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLORS = {
    "red": (225, 40, 45),
    "orange": (240, 140, 30),
    "yellow": (245, 230, 60),
    "green": (50, 185, 75),
    "cyan": (70, 215, 225),
    "blue": (55, 85, 235),
    "purple": (170, 60, 210),
    "white": (240, 240, 240),
}
BACKGROUND = (20, 20, 26)
SIZES = {"small": 0.125, "large": 0.18}
"""Radii; what lies nearer to the one is of that size."""
SIZE_BORDER = 0.1525
LATTICE = 14
"""Centres lie on multiples of a fourteenth of the side, so that a small tokenizer and a small generator learn the world
in minutes."""
RELATIONS = ("left of", "right of", "above", "below")
"""Of the first shape to the second: the axis on which their centres are farther apart says which one holds."""
PLACES = (
    "at the top left", "at the top", "at the top right",
    "at the left", "in the middle", "at the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
"""Of a single shape's centre, row by row of a 3 x 3 grid, see `PLACE_BORDERS`."""
PLACE_BORDERS = (0.38, 0.62)
NUMBERS = {2: "two", 3: "three", 4: "four"}

MOST_DRAWN = 4  # shapes of a scene
MOST_SEEN = 6  # that a reader tells apart; more count as so many
NO = -1  # an index that names nothing: an attribute that is not said, or not recognised


class Scenes(NamedTuple):
    """N scenes of at most K shapes, drawn or read off; a place without a shape has radius 0 and indices `NO`.

    A reader that sees something there but cannot say what gives a radius above 0 and `NO` for what it cannot say.
    """

    shapes: Tensor  # [N, K] int64, place in SHAPES
    colors: Tensor  # [N, K] int64, place in COLORS
    radii: Tensor  # [N, K] fp32
    centers: Tensor  # [N, K, 2] fp32, x and y

    @property
    def present(self) -> Tensor:
        """[N, K] bool."""
        return self.radii > 0

    @property
    def sizes(self) -> Tensor:
        """[N, K] int64, place in SIZES."""
        return torch.where(self.present, (self.radii > SIZE_BORDER).long(), NO)

    @property
    def places(self) -> Tensor:
        """[N, K] int64, place in PLACES."""
        borders = torch.tensor(PLACE_BORDERS, device=self.centers.device)
        column, row = torch.bucketize(self.centers.contiguous(), borders).unbind(-1)
        return torch.where(self.present, 3 * row + column, NO)

    def relations(self) -> Tensor:
        """[N, K, K] int64, place in RELATIONS of what holds between shape i and shape j."""
        apart = self.centers[:, None] - self.centers[:, :, None]  # [N, i, j, 2], from i to j
        x, y = apart.unbind(-1)
        both = self.present[:, :, None] & self.present[:, None]
        found = torch.where(x.abs() >= y.abs(), torch.where(x > 0, 0, 1), torch.where(y > 0, 2, 3))
        return found.masked_fill(~both, NO)

    def to(self, device: torch.device | str) -> "Scenes":
        """The same scenes on another device."""
        return Scenes(*(field.to(device) for field in self))

    @staticmethod
    def empty(count: int, slots: int) -> "Scenes":
        """N scenes without shapes."""
        nothing = torch.full((count, slots), NO)
        return Scenes(nothing, nothing.clone(), torch.zeros(count, slots), torch.zeros(count, slots, 2))


@dataclass(frozen=True)
class Thing:
    """What is said of one shape, as places in the tuples above; `NO` is not said."""

    shape: int = NO
    color: int = NO
    size: int = NO


@dataclass(frozen=True)
class Request:
    """What a caption asks for: as many shapes as there are `things`, in any order.

    Counted shapes ("three red circles") are so many equal things. A relation is that of the first thing to the second.
    """

    things: tuple[Thing, ...]
    relation: int = NO
    place: int = NO

    @property
    def is_counting(self) -> bool:
        """Whether it asks for a number of equal things."""
        return len(self.things) > 1 and len(set(self.things)) == 1 and self.relation == NO
