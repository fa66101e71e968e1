"""Examples: a scene and what a caption says of it, by split and number, with combinations held out of training.

Held out are one colour of each shape, and of each shape and axis the second shape of a pair ("a circle left of a
square" asks for the same pair as "a square right of a circle"). No scene of the split `train` shows such a
combination, whether its caption says so or not; the captions of the splits named `..._unseen` ask for one. Which ones
is a function of their names alone. Besides, of the requests with many meanings (`color_attr`, `scenes`) a sixteenth is
kept for `validation` and another for `test`.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from grpo.config import UserError
from grpo.shapes.grammar import CATEGORIES, canonical, caption, category, wordings
from grpo.shapes.rendering import EXTENT
from grpo.shapes.world import (
    COLORS,
    MOST_DRAWN,
    NO,
    PLACE_BORDERS,
    RELATIONS,
    SHAPES,
    SIZES,
    Request,
    Scenes,
    Thing,
)

SPLITS = {
    "train": 100_000,  # for the generator
    "reader": 100_000,  # for networks that read: every combination
    "validation": 9_000, "validation_unseen": 5_000,
    "test": 9_000, "test_unseen": 5_000,
}  # fmt: skip
"""Number of examples of each split. Example i is a function of the split's name and of i."""

UNSEEN_CATEGORIES = ("counting", "colors", "position", "color_attr", "scenes")
"""Those whose captions can ask for a combination that is held out."""

TRAIN_WEIGHTS = {
    "single_object": 1, "two_object": 1, "counting": 2, "colors": 1, "position": 2, "color_attr": 3, "sizes": 1,
    "places": 1, "scenes": 8,
}  # fmt: skip
"""How often a category comes in `train` and `reader`; in the other splits they take turns."""

KEPT_APART = ("color_attr", "scenes")
GAP, MARGIN, CLEARNESS = 0.06, 0.015, 0.08
"""Least distance of shapes, of a shape from the border, and of a centre from where another word would be true."""
ATTEMPTS = 64


class Example(NamedTuple):
    """A caption, what it asks for, and a scene that shows it: its things' numbers and places."""

    caption: str
    request: Request
    things: tuple[Thing, ...]  # as drawn, every attribute known
    radii: np.ndarray  # [n]
    centers: np.ndarray  # [n, 2]


@cache
def held_out_colors() -> frozenset[tuple[int, int]]:
    """Pairs (shape, colour) that are not in `train`: one colour of each shape."""
    return frozenset(
        (index, min(range(len(COLORS)), key=lambda color: _hash(f"{shape} {list(COLORS)[color]}")))
        for index, shape in enumerate(SHAPES)
    )


@cache
def held_out_pairs() -> frozenset[tuple[int, int, int]]:
    """Triples (first shape, axis, second shape) that are not in `train`: left of (axis 0) and above (1)."""
    return frozenset(
        (index, axis, min(range(len(SHAPES)), key=lambda other: _hash(f"{shape} {RELATIONS[2 * axis]} {SHAPES[other]}")))
        for index, shape in enumerate(SHAPES)
        for axis in (0, 1)
    )


def is_unseen(request: Request) -> bool:
    """Whether it asks for a combination that is held out."""
    request = canonical(request)
    if any((thing.shape, thing.color) in held_out_colors() for thing in request.things):
        return True
    if request.relation == NO:
        return False
    first, second = request.things
    return (first.shape, request.relation // 2, second.shape) in held_out_pairs()


def example(split: str, index: int) -> Example:
    """Example `index` of a split. Raises a UserError where there is no such split."""
    if split not in SPLITS:
        raise UserError(f"data.split {split!r} is no part of the shapes: choose one of {', '.join(SPLITS)}")
    random = np.random.default_rng((zlib.crc32(split.encode()), index))
    unseen = split.endswith("_unseen")
    if split in ("train", "reader"):
        names, weights = list(TRAIN_WEIGHTS), np.array(list(TRAIN_WEIGHTS.values()), dtype=float)
        wanted = names[random.choice(len(names), p=weights / weights.sum())]
    else:
        names = UNSEEN_CATEGORIES if unseen else CATEGORIES
        wanted = names[index % len(names)]
    bucket = {"train": 2, "test": 0, "validation": 1}.get(split)
    while True:
        shown = _scene(random, wanted, anything=unseen or split == "reader")
        request = _said(random, wanted, *shown)
        if request is None or (split != "reader" and is_unseen(request) != unseen):
            continue
        if bucket is None or wanted not in KEPT_APART or _bucket(request) == bucket:
            break
    things, relation, place = shown
    radii = np.array([random.uniform(*list(SIZES.values())[thing.size]) for thing in things])
    centers = _layout(random, radii * EXTENT, relation, place)
    return Example(caption(request, wording=int(random.integers(wordings(request)))), request, things, radii, centers)


def scenes(examples: Sequence[Example]) -> Scenes:
    """What the examples show."""
    result = Scenes.empty(len(examples), MOST_DRAWN)
    for row, item in enumerate(examples):
        count = len(item.things)
        result.shapes[row, :count] = torch.tensor([thing.shape for thing in item.things])
        result.colors[row, :count] = torch.tensor([thing.color for thing in item.things])
        result.radii[row, :count] = torch.from_numpy(item.radii).float()
        result.centers[row, :count] = torch.from_numpy(item.centers).float()
    return result


def _hash(text: str) -> int:
    return zlib.crc32(f"held out: {text}".encode())


def _bucket(request: Request) -> int:
    """0 is for `test`, 1 for `validation`, 2 for all else."""
    return min(_hash(caption(canonical(request))) % 16, 2)


def _scene(random: np.random.Generator, wanted: str, *, anything: bool) -> tuple[tuple[Thing, ...], int, int]:
    """Things with all attributes, and their relation (of two) or place (of one). Without `anything`, seen ones only."""
    number = {"counting": int(random.integers(2, 5)), "single_object": 1, "colors": 1, "sizes": 1, "places": 1}.get(wanted, 2)
    if wanted == "scenes" and random.random() < 0.25:
        number = 1
    while True:
        drawn = [Thing(*(int(random.integers(len(known))) for known in (SHAPES, COLORS, SIZES))) for _ in range(number)]
        things = tuple(drawn[:1] * number if wanted == "counting" else drawn)
        relation = int(random.integers(len(RELATIONS))) if number == 2 else NO
        if anything or not is_unseen(Request(things, relation=relation)):
            return things, relation, int(random.integers(9)) if number == 1 else NO


def _said(
    random: np.random.Generator, wanted: str, things: tuple[Thing, ...], relation: int, place: int
) -> Request | None:
    """What a caption of that category says of a scene; None where it would be of another category."""
    says: Callable[[float], bool] = lambda share: bool(random.random() < share)  # noqa: E731
    has_color = wanted in ("colors", "color_attr")
    if wanted == "counting":
        color, size = says(0.5), says(0.25)
        said = (Thing(things[0].shape, things[0].color if color else NO, things[0].size if size else NO),) * len(things)
        return Request(said)
    if wanted == "scenes":
        said = tuple(
            Thing(thing.shape, thing.color if says(0.8) else NO, thing.size if says(0.4) else NO) for thing in things
        )
        relation, place = (relation if says(0.75) else NO), (place if says(0.6) else NO)
    else:
        said = tuple(
            Thing(thing.shape, thing.color if has_color else NO, thing.size if wanted == "sizes" else NO)
            for thing in things
        )
        relation, place = (relation if wanted == "position" else NO), (place if wanted == "places" else NO)
    request = Request(said, relation, place)
    return request if category(request) == wanted and len(set(said)) == len(said) else None


def _layout(random: np.random.Generator, extents: np.ndarray, relation: int, place: int) -> np.ndarray:
    """Centres [n, 2] of shapes that reach so far: inside, apart, and clearly in that relation or place."""
    count = len(extents)
    low, high = extents + MARGIN, 1 - extents - MARGIN  # [n]
    if count == 1:
        edges = np.array([0.0, *PLACE_BORDERS, 1.0])
        cell = np.array([place % 3, place // 3])
        return random.uniform(
            np.maximum(low, edges[cell] + CLEARNESS / 2), np.minimum(high, edges[cell + 1] - CLEARNESS / 2)
        )[None]
    if count > 2:
        quarters = np.array([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
        free = 0.25 - extents[:, None] - max(MARGIN, GAP / 2)
        return random.permutation(quarters)[:count] + random.uniform(-1, 1, (count, 2)) * free
    axis, sign = relation // 2, 1 if relation % 2 == 0 else -1
    while True:
        tries = random.uniform(low[:, None], high[:, None], (ATTEMPTS, 2, 2))  # [attempt, thing, x or y]
        apart = (tries[:, 1] - tries[:, 0]) * sign
        along, across = apart[:, axis], np.abs(apart[:, 1 - axis])
        good = np.flatnonzero((along > extents.sum() + GAP) & (across < along - CLEARNESS))
        if len(good):
            return tries[good[0]]
