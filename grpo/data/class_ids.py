"""From the names of classes in a data set to the class ids of a model. An id is never guessed.

A source has names (folders, a `ClassLabel`) or bare integers. A model has learned some classes, named or not, and may
have ids that no class has yet: all of them where it is trained from scratch, `model.new_classes` of them otherwise. The
first row that fits decides:

| the source has | the model | ids |
|---|---|---|
| integers | any | the integers |
| a name that `data.class_map` maps | any | the number there; a name there is treated as below; others are refused |
| all names of the model, in its order | learned | the places in that order |
| a name of a class of the model | learned | that class |
| a WordNet id, or another name of an ImageNet class | ImageNet | that class; refused where two classes have the name |
| WordNet ids only | from scratch, 1,000 classes | ImageNet's |
| numbers only, each below `num_classes` | from scratch, or learned and none of its names is meant | the numbers |
| as many names as classes | learned, no class has a name | the places in sorted order |
| other names, not more than free ids | from scratch, or `model.new_classes` | the free ids, in sorted order |
| other names | learned | refused |

Folders are sorted; the order of a `ClassLabel` is its own. Names are compared in Unicode's NFC, without regard to case,
and `_` and `-` count as spaces; new names that differ in nothing else are two classes, with a note. Two names have one
id only where `data.class_map` says so of both, else they are refused. A name that no image has is passed over, except
that it keeps its place where places decide.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from grpo.config import UserError
from grpo.data.class_map import is_class_id, looks_like_number, nfc
from grpo.models import WORDNET_ID, imagenet, imagenet_names, numbered

logger = logging.getLogger(__name__)

NAMES_TOLD = 4
REMEDIES = (
    "say which is which in data.class_map (a file of lines: class, id or name), rename them to the model's classes, or "
    "let `grpo pretrain` add them to the model with model.new_classes"
)
OF_PUBLISHED_LISTS = {134: ["crane bird"], 517: ["crane2", "construction crane"], 639: ["maillot tank suit"]}
"""How lists of ImageNet's names (torchvision's, Hugging Face's) tell its namesakes apart."""


def find_class_ids(
    names: Sequence[str],
    *,
    num_classes: int,
    learned: Sequence[str] = (),
    class_map: Mapping[str, str] | None = None,
    used: Sequence[int] | None = None,
    source: str = "the data set",
) -> list[int]:
    """Class id of each name; -1 for a name that no image has and that has no id. The table above says how.

    Args:
        names: classes of the data set, in its order.
        num_classes: of the model.
        learned: names of the classes that the model has learned, the first ids; () is a training from scratch.
        class_map: name -> class id, or name of a class, in digits or letters. None is no map.
        used: places of the names that images have; None is all.
        source: of the names, for messages.

    Raises:
        UserError: an id would be a guess.
    """
    known = _Known(learned)
    asked = {place: names[place] for place in (range(len(names)) if used is None else used)}
    if class_map is None:
        meant, found = asked, _by_place(names, asked, known, num_classes)
        if found is None:
            found = _by_name(asked, known, num_classes, {}, source)
        _refuse_shared(found, asked, source)
    else:
        meant = _mapped(asked, class_map, names, known, num_classes, source)
        said = {place: int(text) for place, text in meant.items() if is_class_id(text)}
        found = _by_name(meant, known, num_classes, said, f"data.class_map for {source}")
    _note_alike((name for place, name in meant.items() if found[place] >= len(learned)), source)
    return [found.get(place, -1) for place in range(len(names))]


def class_id_of(name: str, *, num_classes: int, learned: Sequence[str]) -> int:
    """The class that a recipe calls so, by its id in digits or by any of its names.

    Raises:
        UserError: the model has no such class, or several.
    """
    known = _Known(learned)
    ids = {int(name)} if is_class_id(name) else known.find(name)
    if len(ids) > 1:
        raise UserError(f"{name!r} is a name of the classes {known.titles(ids)}: give the id")
    if not ids or min(ids) >= num_classes:
        raise UserError(f"{name!r} is no class of the model: give ids in 0..{num_classes - 1}, or names that it knows")
    return min(ids)


def implied_classes(names: Sequence[str], *, num_classes: int) -> tuple[str, ...]:
    """ImageNet's classes where a training from scratch has all of their ids free and names are WordNet's ids."""
    is_imagenet = num_classes == len(imagenet()) and len(names) > 0 and all(name in imagenet() for name in names)
    return imagenet_names() if is_imagenet else ()


class _Known:
    """The classes that a model has learned, to be found by any of their names."""

    def __init__(self, learned: Sequence[str]) -> None:
        self.names = tuple(learned)
        self._titles, self._own, self._others = list(learned), defaultdict(set), defaultdict(set)
        for class_id, name in enumerate(learned):
            self._own[_plain(name)].add(class_id)
        if tuple(learned[: len(imagenet())]) == imagenet_names():
            self._titles[: len(imagenet())] = imagenet()
            for class_id, (wordnet_id, names) in enumerate(imagenet().items()):
                for name in (wordnet_id, ", ".join(names), *names, *OF_PUBLISHED_LISTS.get(class_id, ())):
                    self._others[_plain(name)].add(class_id)

    def find(self, name: str) -> set[int]:
        """Ids of the classes that are called so: the usual name of one class comes before other names of others."""
        for alias in (name, name.partition(",")[0]):
            own, others = self._own.get(_plain(alias), set()), self._others.get(_plain(alias), set())
            if own or others:
                return own if len(own) == 1 else own | others
        return set()

    def titles(self, class_ids: Iterable[int]) -> str:
        """The classes for a message; ImageNet's by their WordNet ids, for names may occur twice."""
        return " and ".join(f"{class_id} ({self._titles[class_id]})" for class_id in sorted(class_ids))


def _by_place(names: Sequence[str], asked: Mapping[int, str], known: _Known, num_classes: int) -> dict[int, int] | None:
    """Ids where the places of all names decide, or their numbers do; None where each name has to be looked for."""
    learned = known.names
    in_order = dict(enumerate(range(len(names))))
    if learned and len(names) == len(learned) and all(place in known.find(name) for place, name in enumerate(names)):
        return in_order
    if any(known.find(name) for name in asked.values()):
        return None
    if all(is_class_id(name) and int(name) < num_classes for name in asked.values()):
        return {place: int(name) for place, name in enumerate(names) if is_class_id(name)}
    is_unnamed = learned == numbered(len(learned))
    if not learned or (is_unnamed and len(names) == num_classes == len(learned)):
        return in_order  # more than num_classes are told with an image that is outside
    return None


def _by_name(
    asked: Mapping[int, str], known: _Known, num_classes: int, said: Mapping[int, int], source: str
) -> dict[int, int]:
    """Ids of the model's classes by their names, and free ids for other names.

    Args:
        said: ids that need no looking for, by place; they are not free any more.
    """
    candidates = {place: known.find(name) for place, name in asked.items() if place not in said}
    found = {**said, **{place: next(iter(ids)) for place, ids in candidates.items() if len(ids) == 1}}
    twofold = [(asked[place], ids) for place, ids in candidates.items() if len(ids) > 1]
    others = {place: asked[place] for place, ids in candidates.items() if not ids}
    free = sorted(set(range(len(known.names), num_classes)) - set(found.values()))
    new = list(dict.fromkeys(others.values()))
    problems = [_refusal(new, known.names, free, source)] if len(new) > len(free) else []
    if twofold:
        (name, several), more = twofold[0], f" (and {len(twofold) - 1} more such names)" if len(twofold) > 1 else ""
        of_classes = f"{name!r} is a name of the classes {known.titles(several)}"
        problems.append(f"{source}: {of_classes}{more}: use the WordNet id, or data.class_map")
    if problems:
        raise UserError(problems)
    ids = dict(zip(new, free, strict=False))
    return found | {place: ids[name] for place, name in others.items()}


def _mapped(
    asked: Mapping[int, str],
    class_map: Mapping[str, str],
    names: Sequence[str],
    known: _Known,
    num_classes: int,
    source: str,
) -> dict[int, str]:
    """What the names are mapped to. Raises a UserError with a line for each line of the map that cannot be meant."""
    class_map = {nfc(name): nfc(said) for name, said in class_map.items()}
    asked = {place: nfc(name) for place, name in asked.items()}
    of_images, of_source = set(asked.values()), {nfc(name) for name in names}
    problems = []
    for place, (name, said) in enumerate(class_map.items()):
        if is_class_id(said):
            if name in of_images and int(said) >= num_classes:
                problems.append(
                    f"data.class_map maps {name!r} to {said}, outside 0..{num_classes - 1}: correct it, or set "
                    "num_classes to the number of classes"
                )
        elif known.find(said):
            continue
        elif looks_like_number(said):
            text = said if len(said) <= 20 else f"{said[:20]}..."
            is_none = f"data.class_map maps {name!r} to {text}, which is no class id"
            problems.append(f"{is_none}: give one in 0..{num_classes - 1}")
        elif place == 0 and name not in of_source:
            problems.append(
                f"data.class_map begins with {name!r}, {said!r}: {source} has no class {name!r}, and the model has no "
                f"class {said!r}; leave out the line (a header?) or correct it"
            )
    if missing := [name for name in dict.fromkeys(asked.values()) if name not in class_map]:
        problems.append(f"data.class_map has no line for {_listed(missing)} of {source}: add one")
    if problems:
        raise UserError(problems)
    return {place: class_map[name] for place, name in asked.items()}


def _refuse_shared(found: Mapping[int, int], asked: Mapping[int, str], source: str) -> None:
    """Two classes of the data are one of the model only where the user says so."""
    first: dict[int, str] = {}
    for place, name in asked.items():
        if place in found and (other := first.setdefault(found[place], name)) != name:
            raise UserError(
                f"{source}: {other!r} and {name!r} are both class {found[place]} of the model: make them one, or say "
                "in data.class_map which class each of them is"
            )


def _note_alike(names: Iterable[str], source: str) -> None:
    """Names that only their writing tells apart are two classes; where they were meant to be one, this tells."""
    first: dict[str, str] = {}
    for name in names:
        if (other := first.setdefault(_plain(name), name)) != name:
            logger.warning("%s: %r and %r are written differently: two classes", source, other, name)


def _refusal(unknown: list[str], learned: Sequence[str], free: Sequence[int], source: str) -> str:
    """Why these names have no id, and what to do."""
    one = len(unknown) == 1
    if not learned:
        return (
            f"{source}: {_listed(unknown)} {'has' if one else 'have'} no id left, {len(free)} of num_classes are free: "
            "correct data.class_map, or set num_classes to the number of classes"
        )
    if any(WORDNET_ID.fullmatch(name) for name in unknown) and tuple(learned) == imagenet_names():
        reason = f"{'is' if one else 'are'} not among ImageNet's 1000 classes"
    elif tuple(learned) == numbered(len(learned)):
        reason = f"cannot be compared with the model's {len(learned)} classes, whose names are not known"
    else:
        reason = f"{'is no class' if one else 'are no classes'} of the model, which has {_listed(learned)}"
    room = f", and model.new_classes leaves {len(free)} {'id' if len(free) == 1 else 'ids'}" if free else ""
    return f"{source}: {_listed(unknown)} {reason}{room}; an id would be a guess: {REMEDIES}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return ", ".join(repr(name) for name in names[:NAMES_TOLD]) + more


def _plain(name: str) -> str:
    return " ".join(nfc(nfc(name).casefold()).replace("_", " ").replace("-", " ").split())
