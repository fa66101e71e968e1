"""The command line, taken apart without knowing what a flag means."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """One flag as typed: `--name text`, `--name=text`, or `--name` alone, whose text is None.

    A word that is no flag and no flag's value is kept as one, so that mistakes are told in their order.
    """

    name: str
    text: str | None

    def __str__(self) -> str:
        return self.name if self.text is None else f"{self.name} {self.text or '(empty)'}"


def split_arguments(arguments: Sequence[str]) -> list[Flag]:
    """The flags of a command line; the word after one is its value unless it begins with a minus and is no number."""
    flags: list[Flag] = []
    is_open = False  # whether the last flag still waits for its value
    for word in arguments:
        if word.startswith("-") and not _is_number(word):
            name, equals, text = word.partition("=")
            flags.append(Flag(name, text if equals else None))
            is_open = not equals
        elif is_open:
            flags[-1] = Flag(flags[-1].name, word)
            is_open = False
        else:
            flags.append(Flag(word, None))
    return flags


def help_topics(arguments: Sequence[str]) -> list[str] | None:
    """The words after `--help` or `-h`; None where no help is asked for."""
    asked = [place for place, word in enumerate(arguments) if word in ("--help", "-h")]
    return [word for word in arguments[asked[0] + 1 :] if not word.startswith("-")] if asked else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
