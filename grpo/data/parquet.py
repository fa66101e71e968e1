"""Images with labels in Parquet files."""

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from grpo.config import Data, UserError, innermost, reason
from grpo.data.huggingface import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    SavedDataset,
    caption_column,
    check_arrow,
    first_column,
)
from grpo.data.index_cache import cache_folder, on_main_rank
from grpo.data.shard_files import shard_files, shard_root


class ParquetDataset(SavedDataset):
    """Rows of Parquet files: an image, bytes or a path, and a label, in columns as in a saved Hugging Face dataset.

    A row of a Parquet file cannot be read without its neighbours, hundreds of images. So `datasets` writes the two
    columns once into an Arrow file, which is memory-mapped: rank 0 of each host, for all, into data.index_cache. It is
    made again when the files' time stamps change.
    """

    def __init__(self, *, data: Data, with_captions: bool = False) -> None:
        self._files = shard_files(data, ".parquet")
        counts, columns = on_main_rank(partial(_inspect, self._files, data, with_captions))
        self._starts = np.cumsum([0, *counts])
        if not self._starts[-1]:
            raise UserError(f"data.path {data.path} has no rows: check the files")
        on_main_rank(lambda: bool(_to_arrow(self._files, columns, data)))
        rows = _to_arrow(self._files, columns, data)
        super().__init__(data=data, with_captions=with_captions, rows=rows, folder=shard_root(data))

    def identify(self) -> Iterable[bytes]:
        return (f"{file.name} {file.stat().st_size}".encode() for file in self._files)

    def describe(self, index: int) -> str:
        number = self.number(index)
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return f"row {number - self._starts[file]} of {self._files[file]}"


def _inspect(files: list[Path], data: Data, with_captions: bool) -> tuple[list[int], list[str]]:
    """Rows of each file, and the columns of images and of labels or captions, from what stands at the files' ends."""
    counts: list[int] = []
    columns: list[str] = []
    for file in files:
        with _told(f"{file} cannot be read as a Parquet file"), pyarrow.parquet.ParquetFile(file) as opened:
            counts.append(opened.metadata.num_rows)
            names = opened.schema_arrow.names
        image = first_column(names, IMAGE_COLUMNS, "an image", data, where=str(file))
        if with_captions:
            label = caption_column(names, data, where=str(file))
        else:
            label = first_column(names, LABEL_COLUMNS, "a label", data, where=str(file))
        if columns and columns != [image, label]:
            raise UserError(f"{file} has the columns {[image, label]}, {files[0]} {columns}: they must be alike")
        columns = [image, label]
    return counts, columns


def _to_arrow(files: list[Path], columns: list[str], data: Data) -> datasets.Dataset:
    """The rows, memory-mapped; written first where they are not there yet."""
    folder = cache_folder(data.index_cache, shard_root(data))  # None is the library's own
    names = [glob.escape(str(file)) for file in files]
    datasets.disable_progress_bars()
    with _told(f"data.path {data.path} cannot be read"):
        rows = datasets.Dataset.from_parquet(names, cache_dir=folder and str(folder / "arrow"), columns=columns)
        for file in rows.cache_files:  # it may have come with the data
            check_arrow(Path(file["filename"]))
        return rows


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the libraries in one line; they wrap what went wrong into more than one layer."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries of formats raise all kinds
        raise UserError(f"{what}: {reason(innermost(error))}") from error
