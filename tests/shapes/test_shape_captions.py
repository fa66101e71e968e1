"""Captions of the world of shapes: every request has words, and the words mean the request."""

import random

import pytest

from grpo.config import UserError
from grpo.shapes import Request, Thing, caption, category, parse
from grpo.shapes.grammar import canonical, every_request, wordings
from grpo.shapes.world import NO, RELATIONS

CIRCLE, SQUARE, CROSS = 0, 1, 3
RED, ORANGE, BLUE = 0, 1, 5
SMALL, LARGE = 0, 1


@pytest.fixture(scope="module")
def requests():
    return list(every_request())


def test_there_are_as_many_captions_as_the_documentation_says(requests):
    assert len(set(requests)) == len(requests) == 132_516
    assert sum(wordings(request) for request in requests) == 236_844


def test_captions_are_read_as_what_they_were_made_of(requests):
    for request in random.Random(0).sample(requests, 3000):
        texts = [caption(request, wording=wording) for wording in range(wordings(request))]
        assert [parse(text) for text in texts] == [request] * len(texts)
        assert len(set(texts)) == len(texts)
        assert max(len(text.split()) for text in texts) <= 12


@pytest.mark.parametrize(
    ("text", "things", "relation", "kind"),
    [
        ("a circle", [Thing(CIRCLE)], NO, "single_object"),
        ("an orange circle and a red cross", [Thing(CIRCLE, ORANGE), Thing(CROSS, RED)], NO, "color_attr"),
        ("three small crosses", [Thing(CROSS, NO, SMALL)] * 3, NO, "counting"),
        ("a circle to the right of a square", [Thing(CIRCLE), Thing(SQUARE)], 1, "position"),
        ("A large blue square under a circle", [Thing(SQUARE, BLUE, LARGE), Thing(CIRCLE)], 3, "scenes"),
        ("a square and a circle", [Thing(SQUARE), Thing(CIRCLE)], NO, "two_object"),
        ("a small square", [Thing(SQUARE, NO, SMALL)], NO, "sizes"),
    ],
)
def test_examples_by_hand(text, things, relation, kind):
    assert parse(text) == Request(tuple(things), relation=relation)
    assert category(parse(text)) == kind


def test_place_of_one_thing():
    assert parse("a circle at the bottom left") == Request((Thing(CIRCLE),), place=6)
    assert category(parse("a red circle at the left")) == "scenes"


@pytest.mark.parametrize(
    "text",
    [
        *["", "circle of red", "a red", "a red blue circle", "two circle and a", "a dog", "a circle at the"],
        *["red circle", "an circle", "one circle", "two circle", "two cross", "a circles", "a circle and a circle"],
        *["a ring left of a ring", "three circles at the top", "a circle and a square at the top"],
    ],
)
def test_other_texts_are_refused_with_an_example(text):
    with pytest.raises(UserError, match=r"not of the world of shapes.*circle, square.*red, orange"):
        parse(text)


def test_requests_that_mean_the_same_have_one_form():
    pair = Thing(CIRCLE, RED), Thing(SQUARE)
    for relation in range(len(RELATIONS)):
        turned = Request(pair[::-1], relation=relation ^ 1)
        assert canonical(turned) == canonical(Request(pair, relation=relation))
    assert canonical(Request(pair)) == canonical(Request(pair[::-1]))
    assert canonical(Request(pair, relation=0)) != canonical(Request(pair, relation=1))
