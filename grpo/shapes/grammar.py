"""Captions: from a request to words and back. The grammar has 236,844 captions, see `every_request`."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from grpo.config import UserError, shorten
from grpo.shapes.world import COLORS, NO, NUMBERS, PLACES, RELATIONS, SHAPES, SIZES, Request, Thing

CATEGORIES = (
    "single_object", "two_object", "counting", "colors", "position", "color_attr", "sizes", "places", "scenes",
)  # fmt: skip
"""What a caption is about. The first six are those of GenEval (arXiv 2310.11513); scenes say several things at once."""

WORDINGS = (RELATIONS, ("to the left of", "to the right of", "over", "under"))
COLOR_NAMES, SIZE_NAMES = tuple(COLORS), tuple(SIZES)
EXAMPLE = "a small red circle left of a large blue square"


def category(request: Request) -> str:
    """The place of a request in `CATEGORIES`."""
    things, first = request.things, request.things[0]
    if request.is_counting:
        return "counting"
    if len(things) == 1:
        said = [
            name
            for name, index in (("colors", first.color), ("sizes", first.size), ("places", request.place))
            if index != NO
        ]
        return "single_object" if not said else said[0] if len(said) == 1 else "scenes"
    colored, sized = [thing.color != NO for thing in things], any(thing.size != NO for thing in things)
    if sized or (any(colored) and request.relation != NO) or any(colored) != all(colored):
        return "scenes"
    return "color_attr" if all(colored) else "two_object" if request.relation == NO else "position"


def caption(request: Request, *, wording: int = 0) -> str:
    """The request in words; a relation can be said in two ways."""
    things = request.things
    if request.is_counting:
        return f"{NUMBERS[len(things)]} {_described(things[0])}s" if not _sibilant(things[0]) else _crosses(things)
    first, *others = (_with_article(_described(thing)) for thing in things)
    if others:
        link = "and" if request.relation == NO else WORDINGS[wording][request.relation]
        return f"{first} {link} {others[0]}"
    return first if request.place == NO else f"{first} {PLACES[request.place]}"


def parse(text: str) -> Request:
    """What a caption asks for.

    Raises:
        UserError: it is not in the grammar.
    """
    words = text.lower().split()
    try:
        request = _parse(words)
    except (ValueError, IndexError):
        request = None
    if request is None or not any(caption(request, wording=way).split() == words for way in range(wordings(request))):
        known = f"{', '.join(SHAPES)}; {', '.join(COLORS)}; {', '.join(SIZES)}"
        raise UserError(f'caption "{shorten(text)}" is not of the world of shapes: say it like "{EXAMPLE}" ({known})')
    return request


def every_request() -> Iterator[Request]:
    """Every request once: one thing with a place or without, equal things, two different ones and how they lie."""
    things = [
        Thing(shape, color, size)
        for shape in range(len(SHAPES))
        for color in range(NO, len(COLORS))
        for size in range(NO, len(SIZES))
    ]
    for thing in things:
        yield from (Request((thing,), place=place) for place in range(NO, len(PLACES)))
        yield from (Request((thing,) * number) for number in NUMBERS)
    for pair in itertools.permutations(things, 2):
        yield from (Request(pair, relation=relation) for relation in range(NO, len(RELATIONS)))


def wordings(request: Request) -> int:
    """In how many ways the request can be said."""
    return 1 if request.relation == NO else len(WORDINGS)


def canonical(request: Request) -> Request:
    """The same for all requests that mean the same: "A right of B" is "B left of A", "A and B" is "B and A"."""
    things = request.things
    if request.relation == NO:
        return replace(request, things=tuple(sorted(things, key=lambda thing: (thing.shape, thing.color, thing.size))))
    if request.relation % 2 == 0:
        return request
    return replace(request, things=things[::-1], relation=request.relation - 1)


def _described(thing: Thing) -> str:
    names = ((SIZE_NAMES, thing.size), (COLOR_NAMES, thing.color), (SHAPES, thing.shape))
    return " ".join(known[index] for known, index in names if index != NO)


def _with_article(text: str) -> str:
    return f"{'an' if text[0] in 'aeio' else 'a'} {text}"


def _sibilant(thing: Thing) -> bool:
    return SHAPES[thing.shape].endswith("s")


def _crosses(things: Sequence[Thing]) -> str:
    return f"{NUMBERS[len(things)]} {_described(things[0])}es"


def _parse(words: Sequence[str]) -> Request | None:
    """What the words ask for if they are in the grammar; articles and plurals are not looked at closely."""
    for place, name in enumerate(PLACES):
        if words[-len(name.split()) :] == name.split():
            return Request((_thing(words[: -len(name.split())]),), place=place)
    numbers = {name: number for number, name in NUMBERS.items()}
    if words[0] in numbers:
        singular = words[-1].removesuffix("es") if words[-1].endswith("sses") else words[-1].removesuffix("s")
        return Request((_described_by([*words[1:-1], singular]),) * numbers[words[0]])
    links = [("and", NO), *((name, relation) for names in WORDINGS for relation, name in enumerate(names))]
    for name, relation in sorted(links, key=lambda link: -len(link[0])):  # "to the left of" before "left of"
        if (start := _find(words, name.split())) is not None:
            first, second = _thing(words[:start]), _thing(words[start + len(name.split()) :])
            return Request((first, second), relation=relation) if first != second else None
    return Request((_thing(words),))


def _find(words: Sequence[str], part: Sequence[str]) -> int | None:
    places = range(len(words) - len(part) + 1)
    return next((place for place in places if list(words[place : place + len(part)]) == list(part)), None)


def _thing(words: Sequence[str]) -> Thing:
    """Of an article, a size, a colour and a shape, of which size and colour may be left out."""
    return _described_by(words[1:])


def _described_by(words: Sequence[str]) -> Thing:
    *said, shape = words
    size = SIZE_NAMES.index(said.pop(0)) if said and said[0] in SIZE_NAMES else NO
    color = COLOR_NAMES.index(said.pop(0)) if said else NO
    if said:
        raise ValueError("words are left")
    return Thing(SHAPES.index(shape), color, size)
