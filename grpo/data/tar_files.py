"""WebDataset shards: tar files whose members of one name, but for the ending, are one sample.

A tar is read by offsets: where each member lies is found out once, so any sample can be read at any time, and the order
of a run's samples does not depend on how they lie in the shards. Nothing is ever unpacked.
"""

import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from grpo.config import UserError, reason

OPEN_FILES = 128  # of one process
LARGEST_TEXT = 2**20  # bytes of a label or caption


class Member(NamedTuple):
    """Where a member's content lies."""

    offset: int
    size: int


class TarSample(NamedTuple):
    """Members of one sample, by ending in lower case, without its dot."""

    key: str
    members: dict[str, Member]


def read_samples(path: Path) -> list[TarSample]:
    """The samples of a tar file, in its order.

    Members of one sample follow each other. What is no regular file, and files that begin with a dot, are left out.

    Raises:
        UserError: no tar, a compressed one, or one that is damaged.
    """
    samples: list[TarSample] = []
    size = path.stat().st_size
    for info in _members(path, size):
        folder, _, name = info.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if not info.isreg() or not stem or not ending:
            continue
        if info.sparse is not None or info.offset_data + info.size > size:
            raise UserError(f"{path} is damaged: {info.name!r} does not lie whole inside it; get the file again")
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1].key != key:
            samples.append(TarSample(key.replace("\0", "?").replace("\n", "?"), {}))
        samples[-1].members[ending.lower()] = Member(info.offset_data, info.size)
    return samples


def _members(path: Path, size: int) -> Iterator[tarfile.TarInfo]:
    """Headers one by one. The library takes a damaged one for the end, so what follows is looked at."""
    try:
        with tarfile.open(path, "r:") as tar:
            end, remembers = 0, cast(Any, tar)  # all headers that it has read, in `members`
            while (info := tar.next()) is not None:
                if tar.offset <= end:
                    raise ValueError(f"{info.name!r} has a size below 0")
                end, remembers.members = tar.offset, []
                yield info
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError, MemoryError) as error:
        why = "it is compressed: unpack it with gunzip" if _is_gzip(path) else reason(error)
        raise UserError(f"{path} is not a tar file that can be read: {why}") from error
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if any(block) or len(block) < tarfile.BLOCKSIZE:
        what = "damaged" if block else "cut off"
        raise UserError(f"{path} is {what} at byte {end} of {size}, without the mark of its end: get the file again")


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


class TarReader:
    """Reads members by their offsets; made for loader processes, each of which opens the files that it reads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self._process = paths, 0
        self._open: OrderedDict[int, int] = OrderedDict()  # number of a path -> descriptor, the latest used last

    def read(self, number: int, member: Member) -> bytes:
        """Content of a member of the file of that number. Raises an OSError, also where the file is too short."""
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if number not in self._open:
            while len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self.paths[number], os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(number)
        content = os.pread(self._open[number], member.size, member.offset)
        if len(content) < member.size:
            raise OSError(f"{self.paths[number]} ends in the middle of it")
        return content

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "_process": 0, "_open": OrderedDict()}


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..012}.tar` -> `a-000.tar`, ..., `a-012.tar`, as in a shell; several braces make all combinations."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if not int(first) <= int(last) < int(first) + 10**6:
        raise UserError(f"{pattern}: {match[0]} must count upwards, by less than a million")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for number in numbers for path in expand_braces(before + number + after)]
