"""The files anywhere under a folder, listed folder by folder, each folder again only after it has changed."""

import os
import stat
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grpo.config import UserError
from grpo.data.index_cache import SETTLED_NS, pack, read_index, unpack, write_index

MOST_VISITS = 100  # of one folder: folders that link to each other have factorially many paths
THREADS = 16  # listing waits for the disk, or for a server
_ARRAYS = ("folders", "changed", "file_counts", "names", "sizes")


class Listing(NamedTuple):
    """What is directly in one folder, in sorted order."""

    changed: int  # when the folder was last changed, ns; 0: too recently to be sure that it is so still
    files: list[str]
    sizes: list[int]  # bytes; -1 where there is a name and nothing behind it
    folders: list[str]  # those that begin with a dot are left out


def scan_folder(
    root: str | Path, *, suffixes: Sequence[str], known: Mapping[str, Listing] | None = None
) -> dict[str, Listing]:
    """The listing of each folder under `root`, by its path relative to it; "" is `root` itself.

    Links are followed, but not into a folder that they lie in. What is no file (a pipe, a device) is left out.

    Args:
        suffixes: of the names of files that are wanted, in lower case.
        known: listings of an earlier scan; a folder that has not changed since is not read again.

    Raises:
        UserError: a folder cannot be read.
    """
    known = known or {}
    listings: dict[str, Listing] = {}

    def read(place: tuple[str, tuple]) -> tuple[str, tuple, Listing | None]:
        name, above = place
        path = os.path.join(root, name) if name else os.fspath(root)
        try:
            status = os.stat(path)
            here = status.st_dev, status.st_ino
            if here in above:
                return name, above, None
            listing = known.get(name)
            if listing is None or listing.changed != status.st_mtime_ns:
                listing = _list(path, status.st_mtime_ns, suffixes)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; data sets are read as a whole") from error
        return name, (*above, here), listing

    visits: Counter[tuple[int, int]] = Counter()
    level: list[tuple[str, tuple]] = [("", ())]
    with ThreadPoolExecutor(THREADS) as threads:
        while level:
            found = list(threads.map(read, level))
            listings |= {name: listing for name, _, listing in found if listing is not None}
            visits.update(above[-1] for _, above, listing in found if listing is not None)
            if max(visits.values(), default=0) > MOST_VISITS:
                raise UserError(f"{root} has links that lead to a folder by more than {MOST_VISITS} ways: remove some")
            level = [
                (f"{name}/{folder}" if name else folder, above)
                for name, above, listing in found
                if listing is not None
                for folder in listing.folders
            ]
    return listings


def remembered_scan(root: str | Path, index: Path | None, *, suffixes: Sequence[str]) -> dict[str, Listing]:
    """`scan_folder` with what the file `index` knows from the last time, and then knows for the next."""
    known = _read(index)
    listings = scan_folder(root, suffixes=suffixes, known=known)
    if listings != known:
        _write(index, listings)
    return listings


def _list(path: str, changed: int, suffixes: Sequence[str]) -> Listing:
    if abs(time.time_ns() - changed) < SETTLED_NS:
        changed = 0
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(tuple(suffixes)) and not entry.is_dir():
                size = _size(entry)
                if size is not None:
                    files.append((entry.name, size))
            elif entry.is_dir():
                folders.append(entry.name)
    files.sort()
    return Listing(changed, [name for name, _ in files], [size for _, size in files], sorted(folders))


def _size(entry: os.DirEntry) -> int | None:
    """Of a file; -1 where a link leads nowhere, None for what is no file."""
    try:
        status = entry.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _write(index: Path | None, listings: Mapping[str, Listing]) -> None:
    folders = sorted(listings)
    each = [listings[folder] for folder in folders]
    arrays = {
        "folders": pack(folders),
        "changed": np.array([listing.changed for listing in each], dtype=np.int64),
        "file_counts": np.array([len(listing.files) for listing in each], dtype=np.int64),
        "names": pack([name for listing in each for name in listing.files]),
        "sizes": np.array([size for listing in each for size in listing.sizes], dtype=np.int64),
    }
    write_index(index, arrays)


def _read(index: Path | None) -> dict[str, Listing]:
    """The listings in an index file; none from one that is damaged or names what cannot be in a folder."""
    arrays = read_index(index, _ARRAYS)
    if arrays is None:
        return {}
    try:
        counts, sizes = arrays["file_counts"].tolist(), arrays["sizes"].tolist()
        folders, names = unpack(arrays["folders"], len(counts)), unpack(arrays["names"], len(sizes))
        changed = arrays["changed"].astype(np.int64).tolist()
        if sum(counts) != len(sizes) or len(changed) != len(counts) or min(counts, default=0) < 0:
            return {}
    except (ValueError, TypeError, AttributeError):
        return {}
    inside: dict[str, list[str]] = {folder: [] for folder in folders}
    for folder in folders:
        parent, _, name = folder.rpartition("/")
        if folder and (name in ("", ".", "..") or parent not in inside):
            return {}
        if folder:
            inside[parent].append(name)
    if any("/" in name for name in names):
        return {}
    listings, start = {}, 0
    for folder, count, when in zip(folders, counts, changed, strict=True):
        end = start + count
        listings[folder] = Listing(when, names[start:end], sizes[start:end], sorted(inside[folder]))
        start = end
    return listings
