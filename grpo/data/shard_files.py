"""Which files a data set in many files (tar, parquet) is made of."""

import glob
import re
from pathlib import Path

from grpo.config import Data, UserError
from grpo.data.dataset import DEFAULT_SPLIT
from grpo.data.tar_files import expand_braces


def shard_files(data: Data, suffix: str) -> list[Path]:
    """The files that `data.path` and `data.split` mean, in the order of their names.

    `data.path` is a file, a pattern (`a-{000..123}.tar`, `a-*.tar`), or a folder. Of a folder's files those of the
    split are in a subfolder of its name, or have its name as a word in their own (`train-00000-of-00007.parquet`);
    where there are neither, the default split means all files.

    Raises:
        UserError: there are no such files.
    """
    path = Path(data.place)
    if path.is_dir():
        folder = path / data.split if (path / data.split).is_dir() else path
        files = sorted(file for file in folder.iterdir() if file.name.endswith(suffix) and file.is_file())
        named = [file for file in files if data.split in re.split(r"[^A-Za-z0-9]+", file.name)]
        if folder == path and not named and data.split != DEFAULT_SPLIT:
            raise UserError(
                f"data.path {path} has neither a folder {data.split!r} nor {suffix} files with {data.split!r} in "
                "their names: check data.split"
            )
        files = named if folder == path and named else files
    else:
        names = expand_braces(data.place)
        if len(names) == 1 and not path.exists():
            names = sorted(glob.glob(data.place)) if glob.has_magic(data.place) else names
        files = [Path(name) for name in names]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"data.path {data.path}: {missing[0]} does not exist{_more(missing)}")
    if not files:
        raise UserError(f"data.path {data.path} has no {suffix} files: check the path")
    return files


def shard_root(data: Data) -> Path:
    """The folder of those files."""
    path = Path(data.place)
    return path if path.is_dir() else path.parent


def _more(missing: list[Path]) -> str:
    return f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
