"""From one command line that gives keys several values to the command lines of all combinations."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from pydantic import ValidationError

from grpo.config.builder import CONFIG, Flag
from grpo.config.errors import UserError
from grpo.config.keys import Key
from grpo.config.load import config_of, recipe_builder, split_arguments
from grpo.config.recipe import TrainingRecipe
from grpo.config.values import free_value

MOST_RUNS = 1000
LONGEST_NAME = 150  # letters: a folder's name may have 255
NOT_SWEPT = (CONFIG, "metrics.run_dir", "checkpoint.dir")
"""Keys whose commas are letters: they say where all runs are."""


class Variant(NamedTuple):
    """One combination."""

    name: str  # what it has of its own, such as lr=1e-05,seed=0; may be the name of a folder
    arguments: list[str]  # of the job


def variants(recipe_class: type[TrainingRecipe], arguments: Sequence[str]) -> list[Variant]:
    """Every combination of the values that a command line gives; the last flag's values change fastest.

    A comma separates values, but for keys that take a list: `--data.classes 1,2` is one value. A flag that is given
    several times has each time one value, whatever it is: `--data.classes 1,2 --data.classes 3,4` are two.

    Raises:
        UserError: a value is given twice, or there are too many combinations.
    """
    flags = split_arguments(arguments)
    keys = _keys(recipe_class, flags)
    given: dict[str, list[str | None]] = {}
    for flag, text in flags:
        given.setdefault(flag, []).append(text)
    may_differ = (flag for flag in given if _name(flag, keys) not in NOT_SWEPT)
    swept = {flag: texts for flag in may_differ if len(texts := _values(flag, given[flag], keys)) > 1}
    labels = _labels([_name(flag, keys) for flag in swept])
    count = 1
    for flag, texts in swept.items():
        count *= len(texts)
        [(most, times)] = Counter(_shown(text, keys.get(flag)) for text in texts).most_common(1)
        if times > 1:
            raise UserError(f"{flag}: {most or 'an empty value'} is given {times} times")
    if count > MOST_RUNS:
        raise UserError(f"these are {count} runs: a sweep has at most {MOST_RUNS}")
    found = []
    for chosen in product(*swept.values()):
        of_run = dict(zip(swept, chosen, strict=True))
        told = [_shown(text, keys.get(flag)) for flag, text in of_run.items()]
        name = ",".join(f"{label}={text}" for label, text in zip(labels, told, strict=True))
        others = [pair for pair in flags if pair[0] not in swept]  # as they are, mistakes included
        found.append((name, [*others, *of_run.items()]))
    names = _file_names([name for name, _ in found])
    return [Variant(name, as_arguments(own)) for name, (_, own) in zip(names, found, strict=True)]


def with_keys(recipe_class: type[TrainingRecipe], arguments: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """A command line that sets keys to these values, in the place of its own flags for them under any name."""
    flags = split_arguments(arguments)
    keys = _keys(recipe_class, flags)
    kept = [(flag, text) for flag, text in flags if _name(flag, keys) not in values]
    return as_arguments([*kept, *((f"--{key}", value) for key, value in values.items())])


def as_arguments(flags: Sequence[Flag]) -> list[str]:
    """Words of a command line."""
    words = []
    for flag, text in flags:
        if text is None:
            words.append(flag)
        else:
            words += [f"{flag}={text}"] if not text or text.startswith("-") else [flag, text]
    return words


def _keys(recipe_class: type[TrainingRecipe], flags: Sequence[Flag]) -> dict[str, Key]:
    return recipe_builder(recipe_class, config_of(flags)).keys_of_flags(flags)


def _name(flag: str, keys: Mapping[str, Key]) -> str:
    """The key that a flag sets."""
    return str(keys[flag]) if flag in keys else flag.removeprefix("--")


def _values(flag: str, texts: Sequence[str | None], keys: Mapping[str, Key]) -> list[str | None]:
    """What a flag gives: each of its texts, or the parts of the only one."""
    text, key = texts[0] or "", keys.get(flag)
    table = keys.get(flag.rpartition(".")[0])
    is_free = key is None and table is not None and table.is_table
    may_be_several = not key.takes_list if key else is_free and isinstance(free_value(text), str)
    if len(texts) > 1 or "," not in text or not may_be_several:
        return list(texts)
    return [part.strip() for part in text.split(",")]


def _labels(keys: Sequence[str]) -> list[str]:
    """Short names of keys: the last word, of a reward `NAME.key`; in full where two would be the same."""
    short = [key.removeprefix("reward.") if key.startswith("reward.") else key.rpartition(".")[2] for key in keys]
    return [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]


def _shown(text: str | None, key: Key | None) -> str:
    """A value as the run will have it, so that 1e-5 and 0.00001 are the same."""
    text = "true" if text is None else text
    if key is None or (text == "none" and key.is_optional):
        return text
    try:
        value = key.convert(text, is_text=True)
    except ValidationError:  # which the recipe will tell
        return text
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _file_names(names: Sequence[str]) -> list[str]:
    """Names of folders: of few kinds of letters, short, and all different."""
    plain = [re.sub(r"[^\w.,=+-]+", "-", name, flags=re.ASCII) for name in names]
    return [
        short if len(short) <= LONGEST_NAME and plain.count(short) == 1 else f"{short[:LONGEST_NAME]}-{_digest(name)}"
        for short, name in zip(plain, names, strict=True)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]
