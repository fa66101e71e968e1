"""Examples: a scene and what a caption says of it, by split and number, with combinations held out of training.

Held out are one place of each shape, one number of each shape, one partner of each colour, and of each shape and axis
the second shape of a pair ("a circle left of a square" asks for the same pair as "a square right of a circle"). No
scene of the split `train` shows such a combination, whether its caption says so or not. Which ones is a function of
their names alone. In `validation` and `test` nine captions that ask for seen combinations only, one of each category,
take turns with five that ask for one that is held out. Of the requests with many meanings (`color_attr`, `scenes`) a
sixteenth is kept for `validation` and another for `test`.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import NamedTuple

import torch

from grpo.config import UserError
from grpo.shapes.grammar import CATEGORIES, canonical, caption, category, wordings
from grpo.shapes.rendering import EXTENT
from grpo.shapes.world import (
    COLORS,
    LATTICE,
    MOST_DRAWN,
    NO,
    NUMBERS,
    PLACE_BORDERS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Request,
    Scenes,
    Thing,
)

SPLITS = {"train": 50_000, "reader": 50_000, "validation": 14_000, "test": 14_000}
"""Number of examples: for the generator; for networks that read (every combination); to tune; to claim. Example i is a
function of the split's name and of i."""

UNSEEN_CATEGORIES = ("counting", "position", "color_attr", "places", "scenes")
"""Those whose captions can ask for a combination that is held out."""

TRAIN_WEIGHTS = {
    "single_object": 1, "two_object": 1, "counting": 2, "colors": 3, "position": 2, "color_attr": 3, "sizes": 1,
    "places": 2, "scenes": 6,
}  # fmt: skip
"""How often a category comes in `train` and `reader`: half of the scenes have one thing, from which words are learned
soonest."""

KEPT_APART = ("color_attr", "scenes")
GAP, MARGIN, CLEARNESS = 0.06, 0.015, 0.04
"""Least distance of shapes, of a shape from the border, and of a centre from where another word would be true."""
RADII = tuple(SIZES.values())
_TURNS = tuple((name, False) for name in CATEGORIES) + tuple((name, True) for name in UNSEEN_CATEGORIES)
_DECK = tuple(name for name, times in TRAIN_WEIGHTS.items() for _ in range(times))


class Example(NamedTuple):
    """A caption, what it asks for, and what is drawn: things whose every attribute is known, and how they lie.

    Relation and place are those of the drawing, said or not: of two things, and of one.
    """

    caption: str
    request: Request
    things: tuple[Thing, ...]
    relation: int
    place: int
    seed: str  # of the centres


@cache
def held_out_places() -> frozenset[tuple[int, int]]:
    """Pairs (shape, place) that are not in `train`: one place of each shape that is alone."""
    return frozenset((index, _least(shape, PLACES)) for index, shape in enumerate(SHAPES))


@cache
def held_out_numbers() -> frozenset[tuple[int, int]]:
    """Pairs (shape, number) that are not in `train`: one number of each shape, where nothing else is shown."""
    numbers = tuple(NUMBERS)
    return frozenset((index, numbers[_least(shape, tuple(NUMBERS.values()))]) for index, shape in enumerate(SHAPES))


@cache
def held_out_colors() -> frozenset[frozenset[int]]:
    """Pairs of colours that are not in `train` together: one partner of each colour."""
    names = tuple(COLORS)
    partners = [_least(color, names, other_than=index) for index, color in enumerate(names)]
    return frozenset(frozenset(pair) for pair in enumerate(partners))


@cache
def held_out_pairs() -> frozenset[tuple[int, int, int]]:
    """Triples (first shape, axis, second shape) that are not in `train`: left of (axis 0) and above (1)."""
    return frozenset(
        (index, axis, _least(f"{shape} {RELATIONS[2 * axis]}", SHAPES))
        for index, shape in enumerate(SHAPES)
        for axis in (0, 1)
    )


def is_unseen(request: Request) -> bool:
    """Whether it asks for a combination that is held out."""
    request = canonical(request)
    things, first, last = request.things, request.things[0], request.things[-1]
    if (first.shape, request.place) in held_out_places():
        return True
    if len({thing.shape for thing in things}) == 1 and (first.shape, len(things)) in held_out_numbers():
        return True
    if frozenset((first.color, last.color)) in held_out_colors():
        return True
    return request.relation != NO and (first.shape, request.relation // 2, last.shape) in held_out_pairs()


def split_size(split: str) -> int:
    """Number of its examples. Raises a UserError where there is no such split."""
    if split not in SPLITS:
        raise UserError(f"data.split {split!r} is no part of the shapes: choose one of {', '.join(SPLITS)}")
    return SPLITS[split]


def example(split: str, index: int) -> Example:
    """Example `index` of a split."""
    draw = Random(f"{split} {index}").random
    if split in ("train", "reader"):
        wanted, unseen = _DECK[_one_of(draw, len(_DECK))], False
    else:
        wanted, unseen = _TURNS[index % len(_TURNS)]
    bucket = {"train": 2, "validation": 1, "test": 0}.get(split)
    while True:
        things, relation, place = _scene(draw, wanted, anything=unseen or split == "reader")
        request = _said(draw, wanted, things, relation, place)
        if request is None or (split != "reader" and is_unseen(request) != unseen):
            continue
        if bucket is None or unseen or wanted not in KEPT_APART or _bucket(request) == bucket:
            break
    text = caption(request, wording=_one_of(draw, wordings(request)))
    return Example(text, request, things, relation, place, seed=f"{split} {index} drawn")


def scenes(examples: Sequence[Example]) -> Scenes:
    """What the examples show."""
    result = Scenes.empty(len(examples), MOST_DRAWN)
    for row, item in enumerate(examples):
        draw, count = Random(item.seed).random, len(item.things)
        radii = [RADII[thing.size] for thing in item.things]
        centers = _layout(draw, [radius * EXTENT for radius in radii], item.relation, item.place)
        result.shapes[row, :count] = torch.tensor([thing.shape for thing in item.things])
        result.colors[row, :count] = torch.tensor([thing.color for thing in item.things])
        result.radii[row, :count] = torch.tensor(radii)
        result.centers[row, :count] = torch.tensor(centers)
    return result


def _hash(text: str) -> int:
    return zlib.crc32(f"held out: {text}".encode())


def _least(subject: str, options: Sequence[str], *, other_than: int = NO) -> int:
    """The place of the option whose name, after the subject's, has the least hash."""
    places = [place for place in range(len(options)) if place != other_than]
    return min(places, key=lambda place: _hash(f"{subject} {options[place]}"))


def _bucket(request: Request) -> int:
    """0 is for `test`, 1 for `validation`, 2 for all else."""
    return min(_hash(caption(canonical(request))) % 16, 2)


Draw = Callable[[], float]
"""`random.Random.random`, whose sequence Python promises to keep: the next number in [0, 1)."""


def _one_of(draw: Draw, count: int) -> int:
    return int(draw() * count)


def _scene(draw: Draw, wanted: str, *, anything: bool) -> tuple[tuple[Thing, ...], int, int]:
    """Things with all attributes, and their relation (of two) or place (of one). Without `anything`, seen ones only."""
    number = 2
    if wanted == "counting":
        number = 2 + _one_of(draw, len(NUMBERS))
    elif wanted in ("single_object", "colors", "sizes", "places") or (wanted == "scenes" and draw() < 0.5):
        number = 1
    while True:
        drawn = [Thing(*(_one_of(draw, len(known)) for known in (SHAPES, COLORS, SIZES))) for _ in range(number)]
        things = tuple(drawn[:1] * number if wanted == "counting" else drawn)
        relation = _one_of(draw, len(RELATIONS)) if number == 2 else NO
        place = _one_of(draw, len(PLACES)) if number == 1 else NO
        if anything or not is_unseen(Request(things, relation, place)):
            return things, relation, place


def _said(draw: Draw, wanted: str, things: tuple[Thing, ...], relation: int, place: int) -> Request | None:
    """What a caption of that category says of a scene; None where it would be of another category."""
    if wanted == "counting":
        color, size = draw() < 0.5, draw() < 0.25
        said = (Thing(things[0].shape, things[0].color if color else NO, things[0].size if size else NO),) * len(things)
        return Request(said)
    has_color, has_size = (0.9, 0.5) if wanted == "scenes" else (wanted in ("colors", "color_attr"), wanted == "sizes")
    relates, locates = (0.9, 0.8) if wanted == "scenes" else (wanted == "position", wanted == "places")
    said = tuple(
        Thing(thing.shape, thing.color if draw() < has_color else NO, thing.size if draw() < has_size else NO)
        for thing in things
    )
    request = Request(said, relation if draw() < relates else NO, place if draw() < locates else NO)
    return request if category(request) == wanted and len(set(said)) == len(said) else None


def _layout(draw: Draw, extents: Sequence[float], relation: int, place: int) -> list[tuple[float, float]]:
    """Centres of shapes that reach so far: inside, apart, and clearly in that relation or place."""
    steps = [step / LATTICE for step in range(LATTICE + 1)]
    inside = [[x for x in steps if extent + MARGIN <= x <= 1 - extent - MARGIN] for extent in extents]

    def one_of(points: Sequence[float]) -> float:
        return points[_one_of(draw, len(points))]

    if len(extents) == 1:
        edges = (0.0, *PLACE_BORDERS, 1.0)
        cells = [(edges[cell] + CLEARNESS, edges[cell + 1] - CLEARNESS) for cell in (place % 3, place // 3)]
        x, y = (one_of([x for x in inside[0] if low <= x <= high]) for low, high in cells)
        return [(x, y)]
    if len(extents) > 2:
        quarters, centers = [(0, 0), (0, 1), (1, 0), (1, 1)], []
        for extent, points in zip(extents, inside, strict=True):
            near = [
                x for x in points if x + extent + GAP / 2 <= 0.5
            ]  # in the first half; the other is its mirror image
            sides = quarters.pop(_one_of(draw, len(quarters)))
            x, y = (1 - one_of(near) if side else one_of(near) for side in sides)
            centers.append((x, y))
        return centers
    axis, sign = relation // 2, 1 if relation % 2 == 0 else -1
    while True:
        first, second = ((one_of(points), one_of(points)) for points in inside)
        along, across = (second[axis] - first[axis]) * sign, abs(second[1 - axis] - first[1 - axis])
        if along >= sum(extents) + GAP and across < along - CLEARNESS:
            return [first, second]
