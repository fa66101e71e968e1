"""The boundary to a user's files: what goes wrong in reading or writing one is told in a line that names it."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.config.errors import UserError, printable

LARGEST_TEXT = 2**26
"""Bytes of a text file that is read at once: beyond, it is no list of names and no table of settings."""

_LONGEST = 300


def reason(error: BaseException) -> str:
    """An error in a few words of one line."""
    match error:
        case OSError(strerror=str(words)):
            pass
        case UnicodeDecodeError():
            words = f"byte {error.start} is not UTF-8 text"
        case RecursionError():
            words = "it is nested too deeply"
        case MemoryError():
            words = "it does not fit into memory"
        case KeyError(args=[name, *_]):
            words = f"{name} is missing"
        case _:
            words = " ".join(str(error).split()) or type(error).__name__
    return shorten(words)


def innermost(error: BaseException) -> BaseException:
    """What went wrong first, below the layers of a library that each raise an error of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def shorten(text: str) -> str:
    """As much of a text as fits into a message."""
    text = printable(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@contextmanager
def reading(problem: str, *, remedy: str = "") -> Iterator[None]:
    """Any error of the block, which reads something of a user's and does nothing else, is that thing's: a UserError.

    Args:
        problem: what to say of it before the reason: the thing as the user knows it, and what it is not.
        remedy: what to do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders of formats raise all kinds
        raise UserError(f"{problem}: {reason(error)}{remedy and f'; {remedy}'}") from error


@contextmanager
def writing(thing: object, *, remedy: str = "free space there or give another place") -> Iterator[None]:
    """The same for the block that writes `thing`; what it has begun it removes itself."""
    with reading(f"{thing} cannot be written", remedy=remedy):
        yield


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise an OSError unless `path` is a file, or a link to one: a pipe has no end, a device may have none."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")


def read_bytes(path: str | os.PathLike[str], *, largest: int = LARGEST_TEXT) -> bytes:
    """A file that is small. Raises an OSError, also for a pipe or a device, or a ValueError, for `reading`."""
    require_regular(path)
    with Path(path).open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest} bytes")
    return content


def read_text(path: str | os.PathLike[str], *, largest: int = LARGEST_TEXT) -> str:
    """A text file in UTF-8, with or without a byte order mark; otherwise as `read_bytes`."""
    return read_bytes(path, largest=largest).decode("utf-8-sig")


def text_lines(text: str) -> list[str]:
    """Lines as a file opened as text has them. `splitlines` cuts at U+2028 too, which JSON strings may hold."""
    return io.StringIO(text, newline=None).readlines()
