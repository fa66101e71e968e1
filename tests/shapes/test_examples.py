"""Splits of the world of shapes: what is held out is nowhere in training, and captions tell the truth."""

import hashlib
from collections import Counter

import pytest
import torch

from grpo.config import UserError
from grpo.shapes import (
    CATEGORIES,
    SPLITS,
    Request,
    category,
    example,
    is_unseen,
    parse,
    render,
    scenes,
    score,
    split_size,
)
from grpo.shapes.examples import (
    UNSEEN_CATEGORIES,
    held_out_colors,
    held_out_numbers,
    held_out_pairs,
    held_out_places,
)
from grpo.shapes.grammar import canonical
from grpo.shapes.rendering import EXTENT
from grpo.shapes.world import COLORS, SHAPES


@pytest.fixture(scope="module", params=SPLITS)
def split(request):
    return request.param, [example(request.param, index) for index in range(1400)]


def test_every_caption_is_true_of_its_scene(split):
    _, examples = split
    scores = score(scenes(examples), [item.request for item in examples])
    assert (scores["all"] == 1).all()
    assert [parse(item.caption) for item in examples] == [item.request for item in examples]


def test_shapes_are_inside_and_do_not_touch(split):
    _, examples = split
    drawn = scenes(examples)
    reach = drawn.radii * EXTENT
    low, high = drawn.centers.amin(-1) - reach, drawn.centers.amax(-1) + reach
    assert low[drawn.present].min() > 0.01
    assert high[drawn.present].max() < 0.99
    apart = (drawn.centers[:, :, None] - drawn.centers[:, None]).abs().amax(-1) - reach[:, :, None] - reach[:, None]
    pairs = drawn.present[:, :, None] & drawn.present[:, None] & ~torch.eye(4, dtype=torch.bool)
    assert apart[pairs].min() > 0.05


def test_what_is_held_out():
    shapes = list(range(len(SHAPES)))
    assert sorted(shape for shape, _ in held_out_places()) == shapes
    assert sorted(shape for shape, _ in held_out_numbers()) == shapes
    assert frozenset.union(*held_out_colors()) == set(range(len(COLORS)))
    assert {len(pair) for pair in held_out_colors()} == {2}
    assert sorted((shape, axis) for shape, axis, _ in held_out_pairs()) == [(s, a) for s in shapes for a in (0, 1)]


@pytest.mark.parametrize(
    ("caption", "unseen"),
    [
        ("a circle at the top right", True),
        ("a small red circle at the top", False),
        ("four circles", True),
        ("three circles", False),
        ("a red cross and a blue cross", True),  # two crosses, whatever else is said
        ("a cyan ring and an orange circle", True),
        ("a cyan ring and a red circle", False),
        ("a cross to the right of a circle", True),  # a circle left of a cross
        ("a cross left of a circle", False),
    ],
)
def test_captions_of_held_out_combinations(caption, unseen):
    assert is_unseen(parse(caption)) is unseen


def test_training_shows_nothing_that_is_held_out():
    for index in range(3000):
        item = example("train", index)
        shown = Request(item.things, item.relation, item.place)
        assert not is_unseen(shown), item.caption
        assert not is_unseen(item.request)


def test_pictures_of_training_show_held_out_pairs_of_counted_crosses_alone():
    examples = [example("train", index) for index in range(3000)]
    drawn = scenes(examples)
    rows, first, second = (drawn.relations() % 2 == 0).nonzero().unbind(1)
    axes = drawn.relations()[rows, first, second] // 2
    pairs = zip(drawn.shapes[rows, first].tolist(), axes.tolist(), drawn.shapes[rows, second].tolist(), strict=True)
    shown = [(examples[row], pair) for row, pair in zip(rows.tolist(), pairs, strict=True) if pair in held_out_pairs()]
    assert {pair for _, pair in shown} == {(SHAPES.index("cross"), 0, SHAPES.index("cross"))}
    assert all(category(item.request) == "counting" and len(item.things) > 2 for item, _ in shown)


def test_validation_and_test_take_turns_and_share_no_scene_with_training():
    def meanings(split):
        requests = [example(split, index).request for index in range(2800)]
        return {canonical(one) for one in requests if category(one) in ("color_attr", "scenes")}

    meant = {split: meanings(split) for split in ("train", "validation", "test")}
    seen = {split: {one for one in requests if not is_unseen(one)} for split, requests in meant.items()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    kinds = Counter((category(one.request), is_unseen(one.request)) for one in (example("test", i) for i in range(140)))
    assert kinds == Counter(
        {(name, False): 10 for name in CATEGORIES} | {(name, True): 10 for name in UNSEEN_CATEGORIES}
    )


def test_drawings_are_the_same_on_every_machine():
    """Compared with numbers that are written down: a change of the world must change `VERSION`."""
    examples = [example(split, index) for split in SPLITS for index in (0, 1, 7)]
    text = "|".join(item.caption for item in examples)
    places = scenes(examples).centers.mul(1000).round().long().flatten().tolist()
    assert hashlib.sha256(f"{text} {places}".encode()).hexdigest()[:16] == "6cd3ab2f2206f704"


def test_pictures_of_one_scene_at_two_sizes_are_the_same_scene():
    scene = scenes([example("train", index) for index in range(40)])
    small, large = (render(scene, size).float() for size in (32, 128))
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().max() < 80  # at tips, which a pixel cannot hold
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.5


def test_unknown_split():
    with pytest.raises(UserError, match=r"'dev' .*train, reader, validation, test"):
        split_size("dev")
