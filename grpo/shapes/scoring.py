"""Compare what an image shows with what its caption asked for, attribute by attribute.

Things asked for and shapes found are paired in the way that makes most attributes right. An attribute's score is the
share that is right of what was said of it: `shape`, `color` and `size` over the things, `place` of one thing,
`relation` of two, and `count`, whether there are as many shapes as asked for. `all` is whether everything is right.
"""

import itertools
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from grpo.shapes.world import MOST_DRAWN, MOST_SEEN, NO, Request, Scenes

ATTRIBUTES = ("shape", "color", "size", "place", "relation", "count")


def score(scenes: Scenes, requests: Sequence[Request]) -> dict[str, Tensor]:
    """Of N scenes and requests: [N] fp32 in [0, 1] of each attribute, NaN where nothing is said of it, and of `all`."""
    device = scenes.radii.device
    asked, relation, place, count = (tensor.to(device) for tensor in _tensors(requests))
    found = _padded(scenes)
    order = _pairings(device)  # [P, A] the shape for each thing
    stated = asked != NO  # [N, A, 3]
    seen = torch.stack([found.shapes, found.colors, found.sizes], -1)  # [N, K, 3]
    right = (asked[:, :, None] == seen[:, None]) & stated[:, :, None]  # [N, A, K, 3]
    things = torch.arange(order.shape[1], device=device)
    paired = right[:, things, order]  # [N, P, A, 3]
    holds = found.relations()[:, order[:, 0], order[:, 1]] == relation[:, None]  # [N, P]
    located = found.places[:, order[:, 0]] == place[:, None]
    total = paired.sum((2, 3)) + (holds & (relation != NO)[:, None]) + (located & (place != NO)[:, None])
    rows, best = torch.arange(len(total), device=device), total.argmax(1)
    said, got = stated.sum(1), paired[rows, best].sum(1)  # [N, 3]
    result = dict(zip(("shape", "color", "size"), (got / said).unbind(1), strict=True))  # 0 / 0 is NaN
    nothing = torch.full_like(result["shape"], float("nan"))
    result["place"] = torch.where(place != NO, located[rows, best].float(), nothing)
    result["relation"] = torch.where(relation != NO, holds[rows, best].float(), nothing)
    result["count"] = (found.present.sum(1) == count).float()
    values = torch.stack([result[name] for name in ATTRIBUTES], 1)
    result["all"] = (values.isnan() | (values == 1)).all(1).float()
    return result


def reward(scores: dict[str, Tensor], *, strictness: float) -> Tensor:
    """[N] the mean over the attributes that something was said of, mixed with `all`, whose share is `strictness`."""
    attributes = torch.stack([scores[name] for name in ATTRIBUTES]).nanmean(0)
    return torch.lerp(attributes, scores["all"], strictness)


def _tensors(requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Things [N, A, 3] as shape, colour and size, relation [N], place [N], number of things [N]."""
    nothing = [(NO, NO, NO)] * MOST_DRAWN
    things = [[*((one.shape, one.color, one.size) for one in request.things), *nothing] for request in requests]
    others = [(request.relation, request.place, len(request.things)) for request in requests]
    asked = torch.tensor([rows[:MOST_DRAWN] for rows in things], dtype=torch.int64).view(-1, MOST_DRAWN, 3)
    relation, place, count = torch.tensor(others, dtype=torch.int64).view(-1, 3).unbind(1)
    return asked, relation, place, count


def _padded(scenes: Scenes) -> Scenes:
    """With places for `MOST_SEEN` shapes."""
    missing = MOST_SEEN - scenes.radii.shape[1]
    if not missing:
        return scenes
    empty = Scenes.empty(len(scenes.radii), missing).to(scenes.radii.device)
    return Scenes(*(torch.cat(pair, 1) for pair in zip(scenes, empty, strict=True)))


@cache
def _pairings(device: torch.device) -> Tensor:
    """[P, A] all ways to give `MOST_DRAWN` things different shapes of `MOST_SEEN`."""
    return torch.tensor(list(itertools.permutations(range(MOST_SEEN), MOST_DRAWN)), device=device)
