"""Where checkpoints are kept: a folder that all hosts see, or object storage behind a folder on each host."""

import errno
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

from grpo.checkpoint import folders
from grpo.config import Checkpoint, TransientError, UserError, reason
from grpo.formats import MANIFEST_NAME, RUN_STATE_NAME, FileSum, parse_manifest, read_file


class Storage(ABC):
    """The checkpoints of a run, `step-000100` and so on, each a folder of files.

    Files are written and read in `local`, a folder of this host: the place itself, or a stage on the way there. A name
    counts as a checkpoint's from `publish` on, never before everything is in its place.

    Attributes:
        local: that folder.
        is_remote: whether it is a stage, of which each host has its own.
    """

    is_remote = False

    def __init__(self, local: Path) -> None:
        self.local = local

    @abstractmethod
    def __str__(self) -> str:
        """The place, in the words of the recipe."""

    @abstractmethod
    def listing(self) -> list[str]:
        """Names of checkpoints, the highest step first."""

    @abstractmethod
    def sizes(self, name: str) -> dict[str, int]:
        """The files of a checkpoint, or of what is being written under a partial name, in bytes. Raises an OSError."""

    @abstractmethod
    def read(self, name: str, file: str) -> bytes:
        """A small file of a checkpoint. Raises an OSError, or a ValueError for one that is not small."""

    @abstractmethod
    def write_probe(self) -> UserError | None:
        """Why nothing can be written there, which is made if need be; None if something can."""

    @abstractmethod
    def begin(self, step: int) -> None:
        """Make room for a checkpoint; what unfinished ones have left goes. Raises a UserError: there is one."""

    @abstractmethod
    def publish(self, step: int) -> None:
        """Make the finished checkpoint count, at once."""

    @abstractmethod
    def discard(self, step: int) -> None:
        """Remove what was written of an unfinished checkpoint, as far as possible."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a checkpoint; from its first moment on the name does not count any more."""

    @abstractmethod
    def rename(self, name: str, other: str) -> None:
        """Give a checkpoint a name that does not count; what is there goes. Raises an OSError."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the stage of this host empty."""

    @abstractmethod
    def upload(self, step: int, names: Collection[str]) -> None:
        """Move files of the checkpoint that is being written from the stage to their place."""

    @abstractmethod
    def complete(self, step: int, names: Collection[str]) -> None:
        """See that those of its files that other hosts have uploaded are on this host's stage too."""

    @abstractmethod
    def fetch(self, name: str, sums: Collection[str]) -> None:
        """Bring a checkpoint's files to the stage of this host."""

    def partial(self, step: int) -> Path:
        """The folder to write a checkpoint's files into."""
        return self.local / folders.partial_name(step)

    def inventory(self, name: str) -> tuple[str | None, dict[str, FileSum]]:
        """Why this is not a whole checkpoint, None if each of its files is there in full length; and those files.

        Raises a TransientError where nothing can be said, because it cannot be looked at now.
        """
        path = f"{self}/{name}"
        try:
            text, found = self.read(name, MANIFEST_NAME), self.sizes(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            why = f"{MANIFEST_NAME}: {error.strerror or 'No such file'}"
            return f"{path} is not a whole checkpoint of a run: {why}; take another checkpoint", {}
        except ValueError as error:
            return f"{path} is damaged: {MANIFEST_NAME}: {reason(error)}; take another checkpoint", {}
        except OSError as error:
            raise TransientError(f"{path} cannot be read: {reason(error)}; nothing was changed") from error
        try:
            sums = parse_manifest(text, f"{path}/{MANIFEST_NAME}")
        except UserError as error:
            return str(error), {}
        missing = {name for name, known in sums.items() if found.get(name) != known.size}
        missing |= folders.REQUIRED - sums.keys()
        return f"{path} is incomplete: {', '.join(sorted(missing))} missing or cut short" if missing else None, sums

    def set_aside(self, name: str) -> str:
        """Rename a damaged checkpoint, so that its step can be written anew. Says so."""
        aside = f"{name}.damaged"
        try:
            self.rename(name, aside)
        except OSError as error:
            return f"it could not be renamed ({error.strerror}), looking for the one before"
        return f"renamed to {aside}, looking for the one before"

    def remove_old(self, config: Checkpoint, *, newest: str) -> None:
        """Delete complete checkpoints that are neither among the `keep_last` newest (0: all) nor the `keep_best` best.

        `newest`, the one just written, stays whatever its step is; nothing is deleted unless it is whole.
        """
        if config.keep_last == 0 or self.inventory(newest)[0] is not None:
            return
        others = [name for name in self.listing() if name != newest and self.inventory(name)[0] is None]
        ranked = self.ranked((newest, *others), config) if config.keep_best else ()
        for name in others:
            if name not in {*others[: config.keep_last - 1], *[*ranked][: config.keep_best]}:
                self.delete(name)

    def ranked(self, names: Collection[str], config: Checkpoint) -> dict[str, float]:
        """What keep_best ranks these checkpoints by, the best first; without those that have no such number."""
        scores = {name: score for name in names if (score := self._score(name)) is not None}
        return dict(sorted(scores.items(), key=lambda item: item[1], reverse=config.best_is == "highest"))

    def _score(self, name: str) -> float | None:
        """What a checkpoint is ranked by for keep_best; None if it has no such number."""
        try:
            state = folders.parse_run_file(self.read(name, RUN_STATE_NAME), f"{self}/{name}/{RUN_STATE_NAME}")
        except (UserError, OSError, ValueError):
            return None
        score = state.get("score")
        return score if isinstance(score, float) and math.isfinite(score) else None


class LocalFolder(Storage):
    """A folder of a file system that all hosts see. A checkpoint appears by one rename."""

    def __str__(self) -> str:
        return str(self.local)

    def listing(self) -> list[str]:
        names = (path.name for path in self.local.glob("step-*"))
        return sorted((name for name in names if folders.step_of(name) >= 0), key=folders.step_of, reverse=True)

    def sizes(self, name: str) -> dict[str, int]:
        return {file.name: file.stat().st_size for file in (self.local / name).iterdir() if file.is_file()}

    def read(self, name: str, file: str) -> bytes:
        return read_file(self.local / name / file)

    def write_probe(self) -> UserError | None:
        probe = self.local / f".probe-{os.getpid()}"
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            folders.write_synced(probe, "x")
            probe.unlink()
        except OSError as error:
            kind = TransientError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
            return kind(error.strerror or str(error))
        return None

    def begin(self, step: int) -> None:
        if (self.local / folders.step_name(step)).exists():
            raise UserError(occupied(self, step))
        for leftover in self.local.glob(".step-*"):
            _remove(leftover)
        self.partial(step).mkdir(parents=True)

    def publish(self, step: int) -> None:
        folders.publish(self.partial(step), self.local / folders.step_name(step))

    def discard(self, step: int) -> None:
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def delete(self, name: str) -> None:
        doomed = self.local / f".{name}.removed"
        (self.local / name).rename(doomed)  # at once, so that a half-deleted folder never looks like a checkpoint
        _remove(doomed)

    def rename(self, name: str, other: str) -> None:
        if (self.local / other).exists():
            _remove(self.local / other)
        (self.local / name).rename(self.local / other)

    def prepare(self) -> None:
        """Nothing: what ranks write and read is in its place already."""

    def upload(self, step: int, names: Collection[str]) -> None:
        """Nothing."""

    def complete(self, step: int, names: Collection[str]) -> None:
        """Nothing."""

    def fetch(self, name: str, sums: Collection[str]) -> None:
        """Nothing."""


def _remove(path: Path) -> None:
    """Remove a folder, or a link, whatever it leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def occupied(storage: Storage, step: int) -> str:
    """Why a checkpoint is not written."""
    remedy = "resume from it, remove it, or choose another checkpoint.dir"
    return f"{storage}/{folders.step_name(step)} exists and is not overwritten: {remedy}"
