"""Values as they stand in files and on the command line, before they are those of a key."""

import json
from typing import Any

import tomli
from pydantic import ValidationError

from grpo.config.types import UNNAMED_LIMITS
from grpo.config.user_files import shorten

DEEPEST = 20  # tables and lists in each other in a recipe
MOST_KEYS = 1000  # of a recipe, and flags: beyond, it is something else, and each unknown key takes a millisecond


def require_modest(values: Any) -> None:
    """Raise a RecursionError for nesting that no key has; dotted names nest without an end in the parser.

    A ValueError for more keys than a recipe has.
    """
    level, count = [values], 0
    for _ in range(DEEPEST):
        count += sum(len(value) for value in level if isinstance(value, dict))
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in level if isinstance(value, dict | list)]
    if level:
        raise RecursionError
    if count > MOST_KEYS:
        raise ValueError(f"it has {count} keys, a recipe at most {MOST_KEYS}")


def broken_limit(error: ValidationError) -> str:
    """A limit that the description of a key does not name: the size of whole numbers, and that text is not empty."""
    broken = error.errors()[0]
    if broken["type"] == "string_too_short":
        return ", but not empty"
    bounds = {sign: broken.get("ctx", {}).get(name) for sign, name in (("<=", "le"), (">=", "ge"))}
    return next((f" and {sign} {limit}" for sign, limit in bounds.items() if limit in UNNAMED_LIMITS), "")


def free_value(text: str) -> Any:
    """What a flag gives to a table of free keys: a TOML value, or else text."""
    try:
        value = tomli.loads(f"value = {text}")["value"]
        require_modest([value])
    except (ValueError, RecursionError):
        return text
    return value


def quoted(value: object) -> str:
    return shorten(json.dumps(value, default=str, ensure_ascii=False))
