"""The command line, taken apart without knowing what a flag means."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Flag(NamedTuple):
    """One flag as typed: `--name text`, `--name=text`, or `--name` alone, whose text is None.

    A word that is no flag and no flag's value is kept as one, so that mistakes are told in their order.
    """

    name: str
    text: str | None


def split_arguments(arguments: Sequence[str]) -> list[Flag]:
    """The flags of a command line; the word after one is its value unless it begins with a minus and is no number."""
    flags: list[Flag] = []
    is_open = False  # whether the last flag still waits for its value
    for word in arguments:
        is_flag = re.match(r"-(?![\d.])", word)
        if is_open and not is_flag:
            flags[-1] = Flag(flags[-1].name, word)
            is_open = False
        else:
            name, equals, text = word.partition("=") if is_flag else (word, "", "")
            flags.append(Flag(name, text if equals else None))
            is_open = bool(is_flag and not equals)
    return flags


def help_topics(arguments: Sequence[str]) -> list[str] | None:
    """The words after `--help` or `-h`; None where no help is asked for."""
    asked = [place for place, word in enumerate(arguments) if word in ("--help", "-h")]
    return [word for word in arguments[asked[0] + 1 :] if not word.startswith("-")] if asked else None
