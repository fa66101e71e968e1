"""Checkpoints in object storage, or whatever else fsspec has a file system for: s3://bucket/folder."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from grpo.checkpoint import folders
from grpo.checkpoint.storage import LocalFolder, Storage, occupied
from grpo.config import TransientError, UserError, is_url
from grpo.formats import MANIFEST_NAME


def open_storage(place: str | Path, *, stage: Path) -> Storage:
    """The storage behind a folder's path or an fsspec URL. Raises a UserError: no such kind of URL, package missing."""
    return ObjectStore(str(place), stage) if is_url(str(place)) else LocalFolder(Path(place))


class ObjectStore(Storage):
    """A prefix of an object store.

    There is no rename there that happens at once. `manifest.json` is written last and removed first, and what has none
    is not a checkpoint.
    """

    is_remote = True

    def __init__(self, url: str, stage: Path) -> None:
        super().__init__(stage)
        self._url, scheme = url.rstrip("/"), url.partition("://")[0]
        self._known: dict[str, dict[str, int]] = {}
        self._has_folders = scheme in ("file", "local")  # which stay when the last file in them has gone
        options = {"auto_mkdir": True} if self._has_folders else {}
        try:
            with _told(self._url):
                self._fs, self._root = fsspec.url_to_fs(self._url, **options)
        except ImportError as error:
            remedy = "; pip install 'autoregressive-grpo[s3]'" if scheme in ("s3", "s3a") else ""
            raise UserError(f"{url}: {error}{remedy}") from error

    def __str__(self) -> str:
        return self._url

    def listing(self) -> list[str]:
        self._known = self._look()
        names = [name for name, files in self._known.items() if folders.step_of(name) >= 0 and MANIFEST_NAME in files]
        return sorted(names, key=folders.step_of, reverse=True)

    def sizes(self, name: str) -> dict[str, int]:
        return self._look(name).get(name, {})

    def read(self, name: str, file: str) -> bytes:
        with _told(self._url, passes=(FileNotFoundError,)):
            return self._fs.cat_file(self._key(name, file))

    def write_probe(self) -> UserError | None:
        probe = f"{self._root}/.probe"
        try:
            with _told(self._url):
                self._fs.pipe_file(probe, b"x")
                self._fs.rm_file(probe)
        except UserError as error:
            return error
        return None

    def begin(self, step: int) -> None:
        name = folders.step_name(step)
        if name in self.listing():
            raise UserError(occupied(self, step))
        for leftover, files in self._known.items():
            if folders.step_of(leftover) >= 0 and MANIFEST_NAME not in files:
                self._remove(leftover, files)

    def prepare(self) -> None:
        shutil.rmtree(self.local, ignore_errors=True)
        self.local.mkdir(parents=True)

    def upload(self, step: int, names: Collection[str]) -> None:
        name, partial = folders.step_name(step), self.partial(step)
        for file in names:
            with _told(f"{self._url}/{name}/{file}"):
                self._fs.put_file(str(partial / file), self._key(name, file))

    def complete(self, step: int, names: Collection[str]) -> None:
        partial = self.partial(step)
        self._download(folders.step_name(step), partial, [file for file in names if not (partial / file).exists()])

    def publish(self, step: int) -> None:
        self.upload(step, [MANIFEST_NAME])

    def discard(self, step: int) -> None:
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def fetch(self, name: str, sums: Collection[str]) -> None:
        self.prepare()
        (self.local / name).mkdir()
        self._download(name, self.local / name, [*sums, MANIFEST_NAME])

    def delete(self, name: str) -> None:
        self._remove(name, self.sizes(name))

    def rename(self, name: str, other: str) -> None:
        self._remove(other, self.sizes(other))
        for file in sorted(self.sizes(name), key=lambda file: file != MANIFEST_NAME):
            with _told(f"{self._url}/{name}/{file}"):
                self._fs.mv(self._key(name, file), self._key(other, file))
        self._drop_folder(name)

    def _remove(self, name: str, files: Collection[str]) -> None:
        for file in sorted(files, key=lambda file: file != MANIFEST_NAME):
            with _told(f"{self._url}/{name}/{file}"):
                self._fs.rm_file(self._key(name, file))
        self._drop_folder(name)

    def _drop_folder(self, name: str) -> None:
        if self._has_folders:
            with suppress(OSError):
                self._fs.rmdir(f"{self._root}/{name}")

    def _download(self, name: str, folder: Path, files: Collection[str]) -> None:
        for file in files:
            with _told(f"{self._url}/{name}/{file}"):
                self._fs.get_file(self._key(name, file), str(folder / file))

    def _look(self, name: str = "") -> dict[str, dict[str, int]]:
        """What is there now: folder -> file -> bytes."""
        found: dict[str, dict[str, int]] = {}
        with _told(self._url):
            self._fs.invalidate_cache()
            entries = self._fs.find(f"{self._root}/{name}".rstrip("/"), detail=True)
        for path, entry in entries.items():
            folder, _, file = path.removeprefix(self._root).strip("/").rpartition("/")
            if folder and "/" not in folder:
                found.setdefault(folder, {})[file] = int(entry["size"])
        return found

    def _key(self, name: str, file: str) -> str:
        return f"{self._root}/{name}/{file}"


@contextmanager
def _told(what: str, *, passes: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn whatever a library for a store raises into one line about `what`."""
    told_already: tuple[type[Exception], ...] = (UserError, ImportError, *passes)
    try:
        yield
    except told_already:
        raise
    except (FileNotFoundError, PermissionError, ValueError) as error:  # no such bucket, no right to it, no such scheme
        raise UserError(f"{what}: {_one_line(error)}") from error
    except Exception as error:  # of the network, of credentials: every library has exceptions of its own
        kind = UserError if "Credentials" in type(error).__name__ else TransientError
        raise kind(f"{what}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
