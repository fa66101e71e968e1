"""What the classes of a model are called: names that were written with its weights, or ImageNet's.

A class without a name is called by its number, everywhere.
"""

import os
import re
from functools import cache
from pathlib import Path

from grpo.config import Model, UserError
from grpo.formats import read_config

WORDNET_ID = re.compile(r"n\d{8}")


@cache
def imagenet() -> dict[str, tuple[str, ...]]:
    """WordNet id of each of ImageNet's 1,000 classes -> its names, the usual one first; in the order of class ids.

    That order is the sorted one (ILSVRC 2012). The names are WordNet's lemmas.
    """
    lines = Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8").splitlines()
    return {wordnet_id: tuple(names.split(", ")) for wordnet_id, names in (line.split("\t") for line in lines)}


def imagenet_names() -> tuple[str, ...]:
    """The usual name of each of ImageNet's classes, by class id; crane, cardigan and maillot occur twice."""
    return tuple(names[0] for names in imagenet().values())


def default_names(count: int) -> tuple[str, ...]:
    """Names of the classes of weights that have none with them: 1,000 are ImageNet's, as in every released LlamaGen."""
    return imagenet_names() if count == len(imagenet()) else numbered(count)


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes that have none."""
    return tuple(map(str, range(count)))


def learned_classes(model: Model) -> tuple[str, ...]:
    """Names of the classes that a recipe's weights know, by class id; ids beyond them are still free.

    No weights, or weights of which no class is kept (`model.new_classes`), know none. Of weights without names, 1,000
    classes are ImageNet's, as in every released LlamaGen, and the classes of others are called by their numbers.

    Raises a UserError: the weights have another number of classes.
    """
    kept = model.num_classes - model.new_classes
    if model.checkpoint is None or not kept:
        return ()
    names = written_names(model.checkpoint)
    if names is None:
        return default_names(kept)
    if len(names) != kept:
        raise UserError(class_count_problem(model.checkpoint, found=len(names), wanted=kept, new=model.new_classes))
    return names


def written_names(path: str | os.PathLike[str], count: int | None = None) -> tuple[str, ...] | None:
    """Names of the classes, by class id, that were written with weights; None where there are none.

    Raises a UserError: they are damaged, or not `count` names.
    """
    names = (read_config(path) or {}).get("class_names")
    if names is None:
        return None
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or count not in (None, len(names))
    ):
        raise UserError(f"{path}: the class names in this file are damaged")
    return tuple(names)


def class_count_problem(path: object, *, found: int, wanted: int, new: int = 0) -> str:
    """What to do about weights with another number of classes than a recipe keeps of them."""
    if not new:
        return (
            f"{path}: the weights have num_classes {found}, the recipe wants {wanted}; set model.num_classes = {found} "
            "or take other weights, or say with model.new_classes how many classes are new"
        )
    return (
        f"{path}: the weights have {found} classes; with model.new_classes = {new}, model.num_classes must be {new} "
        f"(the new classes alone) or {found + new} (theirs, then the new ones)"
    )
