"""From the names of classes in a data set to the class ids of a model. An id is never guessed.

A source has names (folders, a `ClassLabel`) or bare integers. A model has learned some classes, named or not, and may
have ids that no class has yet: all of them where it is trained from scratch, `model.new_classes` of them otherwise. The
first row that fits decides:

| the source has | the model | ids |
|---|---|---|
| integers | any | the integers |
| a name that `data.class_map` maps | any | the number there; a name there is treated as below; others are refused |
| all names of the model, in its order (99 of 100 are enough) | learned | the places in that order |
| a name of a class of the model | learned | that class |
| a WordNet id, or another name of an ImageNet class | ImageNet | that class; refused where two classes have the name |
| WordNet ids only | from scratch, 1,000 classes | ImageNet's |
| numbers only, each below `num_classes` | from scratch, or learned and none of its names is meant | the numbers |
| as many names as classes | learned, no class has a name | the places in sorted order |
| other names, not more than free ids | from scratch, or `model.new_classes` | the free ids, in sorted order |
| other names | learned | refused |

Folders are sorted; the order of a `ClassLabel` is its own. Names are compared without regard to case, and `_` and `-`
count as spaces. A name that no image has is passed over, except that it keeps its place where places decide.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import tomli

from grpo.config import UserError, read_text, reading
from grpo.models import WORDNET_ID, imagenet, imagenet_names, numbered

SHARE_IN_ORDER = 0.99  # published lists of ImageNet's names differ in a few
NAMES_TOLD = 4
REMEDIES = (
    "say which is which in data.class_map (a file of lines: class, id or name), rename them to the model's classes, or "
    "add them to the model with model.new_classes"
)


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
    used = range(len(names)) if used is None else used
    asked = {place: names[place] for place in used}
    if class_map is not None:
        asked = _mapped(asked, class_map, source)
    known = _Known(learned)
    candidates = {place: known.find(name) for place, name in asked.items()}
    if class_map is None and learned and len(names) == len(learned):
        every = {place: candidates.get(place) or known.find(name) for place, name in enumerate(names)}
        if sum(place in ids for place, ids in every.items()) >= SHARE_IN_ORDER * len(names):
            return list(range(len(names)))
    if twofold := {place: ids for place, ids in candidates.items() if len(ids) > 1}:
        place, ids = next(iter(twofold.items()))
        of_classes = f"{asked[place]!r} is a name of the classes {known.titles(ids)}"
        raise UserError(f"{source}: {of_classes}: use the WordNet id, or data.class_map")
    found = {place: next(iter(ids)) for place, ids in candidates.items() if ids}
    if class_map is not None:
        found |= {place: int(name) for place, name in asked.items() if _is_number(name)}
        _check_range(found, names, num_classes)
    others = {place: name for place, name in asked.items() if place not in found}
    if others and class_map is None and not found:
        if all(_is_number(name) and int(name) < num_classes for name in others.values()):
            return [int(name) if _is_number(name) else -1 for name in names]
        is_unnamed = tuple(learned) == numbered(len(learned))
        if not learned or (is_unnamed and len(names) == num_classes == len(learned)):
            return list(range(len(names)))  # more than num_classes are told with an image that is outside
    new = dict.fromkeys(map(_plain, others.values()))
    if len(new) > num_classes - len(learned):
        raise UserError(_refusal(list(others.values()), learned, num_classes, source))
    ids = {name: len(learned) + number for number, name in enumerate(new)}
    found |= {place: ids[_plain(name)] for place, name in others.items()}
    return [found.get(place, -1) for place in range(len(names))]


def class_id_of(name: str, *, num_classes: int, learned: Sequence[str]) -> int:
    """The class that a recipe calls so, by its id in digits or by any of its names.

    Raises:
        UserError: the model has no such class, or several.
    """
    known = _Known(learned)
    ids = {int(name)} if _is_number(name) else known.find(name)
    if len(ids) > 1:
        raise UserError(f"{name!r} is a name of the classes {known.titles(ids)}: give the id")
    if not ids or min(ids) >= num_classes:
        raise UserError(f"{name!r} is no class of the model: give ids in 0..{num_classes - 1}, or names that it knows")
    return min(ids)


def implied_classes(names: Sequence[str], *, num_classes: int) -> tuple[str, ...]:
    """ImageNet's classes where a training from scratch has all of their ids free and names are WordNet's ids."""
    is_imagenet = num_classes == len(imagenet()) and len(names) > 0 and all(name in imagenet() for name in names)
    return imagenet_names() if is_imagenet else ()


def read_class_map(path: str) -> dict[str, str]:
    """The mapping in a file: .json or .toml with one table, else lines of two columns, as texts.

    Columns are parted by a tab, else by a comma, else by the first space; empty lines and those with # are left out.

    Raises:
        UserError: it cannot be read, is not such a table, or has a class twice.
    """
    where = f"data.class_map {path}"
    with reading(f"{where} cannot be read"):
        text = read_text(path)
        if path.endswith(".json"):
            pairs = json.loads(text, object_pairs_hook=list)
        elif path.endswith(".toml"):
            pairs = list(tomli.loads(text).items())
        else:
            lines = (line.strip() for line in text.splitlines())
            pairs = [_columns(line, where) for line in lines if line and not line.startswith("#")]
    is_table = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    if not is_table or not all(type(value) in (str, int) for _, value in pairs):
        raise UserError(f"{where} must be one table: class = id, or class = name")
    mapping = {name: str(value) for name, value in pairs}
    if len(mapping) < len(pairs):
        twice = next(name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1)
        raise UserError(f"{where} has {twice!r} twice: leave one of them")
    return mapping


class _Known:
    """The classes that a model has learned, to be found by any of their names."""

    def __init__(self, learned: Sequence[str]) -> None:
        self._titles, self._own, self._others = list(learned), defaultdict(set), defaultdict(set)
        for class_id, name in enumerate(learned):
            self._own[_plain(name)].add(class_id)
        if tuple(learned[: len(imagenet())]) == imagenet_names():
            self._titles[: len(imagenet())] = imagenet()
            for class_id, (wordnet_id, names) in enumerate(imagenet().items()):
                for name in (wordnet_id, ", ".join(names), *names):
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


def _mapped(asked: Mapping[int, str], class_map: Mapping[str, str], source: str) -> dict[int, str]:
    """The names by what they are mapped to."""
    if missing := [name for name in asked.values() if name not in class_map]:
        raise UserError(f"data.class_map has no line for {_listed(missing)} of {source}: add one")
    return {place: class_map[name] for place, name in asked.items()}


def _check_range(found: Mapping[int, int], names: Sequence[str], num_classes: int) -> None:
    for place, class_id in found.items():
        if class_id >= num_classes:
            raise UserError(
                f"data.class_map maps {names[place]!r} to {class_id}, outside 0..{num_classes - 1}: correct it, or "
                "set num_classes to the number of classes"
            )


def _refusal(unknown: list[str], learned: Sequence[str], num_classes: int, source: str) -> str:
    """Why these names have no id, and what to do."""
    free = num_classes - len(learned)
    if any(WORDNET_ID.fullmatch(name) for name in unknown) and tuple(learned) == imagenet_names():
        reason = "are not among ImageNet's 1000 classes"
    elif tuple(learned) == numbered(len(learned)):
        reason = f"cannot be compared with the model's {len(learned)} classes, whose names are not known"
    else:
        reason = f"are no classes of the model, which has {_listed(learned)}"
    room = f", and model.new_classes leaves {free} ids" if free else ""
    return f"{source}: {_listed(unknown)} {reason}{room}; an id would be a guess: {REMEDIES}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return ", ".join(repr(name) for name in names[:NAMES_TOLD]) + more


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _is_number(name: str) -> bool:
    return name.isdecimal() and len(name) <= 9


def _columns(line: str, where: str) -> tuple[str, str]:
    separator = next((mark for mark in "\t," if mark in line), None)
    columns = [column.strip() for column in line.split(separator, 1)]
    if len(columns) != 2 or not all(columns):
        raise UserError(f"{where}: {line!r} is not a class and its id or name")
    return columns[0], columns[1]
