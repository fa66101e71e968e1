"""The one exception for a user's mistake."""

import difflib
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

LONGEST_LINE = 2000
"""Letters of a line for the user: a name in a file from elsewhere may have millions."""


class UserError(Exception):
    """A mistake that the user can mend: says what, where, and what to do.

    The launcher prints the lines on one rank and exits with code 2, without a traceback. Anything that is not the
    user's mistake is another exception (or an assert) and keeps its traceback.

    Args:
        problems: one line, or several that were found together.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [_line(text) for text in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


class TransientError(UserError):
    """One that may be gone at the next start without anybody's doing: no room, no connection, a folder not mounted.

    A launcher that restarts is then let do so; after any other `UserError` a restart ends at once.
    """


def _line(text: str) -> str:
    text = printable(text)
    half = LONGEST_LINE // 2  # what is wrong comes first, what to do about it last
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def printable(text: str) -> str:
    """A text in one line, with nothing in it that could steer the terminal: names of files may come from anyone."""
    if text.isprintable():
        return text
    text = text.replace("\n", " ")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What a mistyped word probably meant, or else all that there is."""
    known = list(known)
    nearest = difflib.get_close_matches(word, known, n=1)
    if not nearest and len(word) > 2:  # a part of a name, such as recon
        nearest = [name for name in known if word.lower() in name or name in word.lower()]
    return f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"


def import_extra(module: str, *, extra: str, wanted_by: str) -> ModuleType:
    """A module of a library that is not among the plain dependencies.

    Args:
        extra: the extra of this project that installs it.
        wanted_by: what cannot be done without it, a key or a kind of reward.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        needs = f"{wanted_by} needs the package {error.name or module}, which is not installed"
        raise UserError(f"{needs}: pip install 'autoregressive-grpo[{extra}]'") from error
    except (ImportError, OSError, RuntimeError) as error:  # of versions that do not fit together
        reason = " ".join(str(error).split())
        raise UserError(f"{wanted_by} needs {module}, which cannot be imported: {reason}") from error
