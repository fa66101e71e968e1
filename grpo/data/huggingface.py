"""A data set written by Hugging Face's `save_to_disk`."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from PIL import Image

from grpo.config import Data, UserError, read_text, reading, require_regular
from grpo.data.captions import Captions, LeftOut, texts_in
from grpo.data.dataset import DEFAULT_SPLIT, ImageDataset
from grpo.data.images import read_image
from grpo.texts import CAPTION_KEYS

IMAGE_COLUMNS = ("image", "image_path", "file", "filepath")
LABEL_COLUMNS = ("label", "labels")
TEXT_AT_ONCE = 1000  # rows


class SavedDataset(ImageDataset):
    """Rows of a saved data set: an image, bytes or a path (relative to the data set's folder), and an integer label, or
    one or several captions.

    Images are decoded here and not by `datasets`, so that a damaged one can be named and skipped.
    """

    def __init__(
        self,
        *,
        data: Data,
        with_captions: bool = False,
        rows: datasets.Dataset | None = None,
        folder: Path | None = None,
    ) -> None:
        self._folder = folder or Path(data.place)
        self._numbers: list[int] | None = None  # of the rows in their source, where some are left out
        rows = rows or _load_split(data)
        if with_captions:
            rows, captions, self._numbers = captioned_rows(rows, data)
        self._column = first_column(rows.column_names, IMAGE_COLUMNS, "an image", data)
        self._rows = _undecoded(rows.select_columns([self._column]), self._column, data)
        if with_captions:
            super().__init__(np.zeros(len(rows)), [], data=data, captions=captions)
            return
        label_column = first_column(rows.column_names, LABEL_COLUMNS, "a label", data)
        class_names = getattr(rows.features[label_column], "names", [])  # a ClassLabel has them
        super().__init__(_read_labels(rows, label_column, data), class_names, data=data)

    def identify(self) -> Iterable[bytes]:
        files = [Path(file["filename"]) for file in self._rows.cache_files]
        return (f"{file.name} {file.stat().st_size}".encode() for file in files)

    def open(self, index: int) -> Image.Image:
        encoded, path = self._stored(index)
        if encoded is not None:
            return read_image(io.BytesIO(encoded))
        if path is None:
            raise ValueError(f"its {self._column!r} is empty")
        return read_image(self._folder / path)

    def describe(self, index: int) -> str:
        _, path = self._stored(index)
        name = f" ({path})" if path else ""
        return f"image {self.number(index)}{name} of split {self.data.split!r} of {self._folder}"

    def number(self, index: int) -> int:
        """Of a row in its source."""
        return int(index) if self._numbers is None else self._numbers[index]

    def _stored(self, index: int) -> tuple[bytes | None, str | None]:
        """The row's encoded image and its path; either may be missing."""
        stored = self._rows[int(index)][self._column]
        if isinstance(stored, dict):
            return stored["bytes"], stored["path"]
        return (stored, None) if isinstance(stored, bytes) else (None, stored)


def _load_split(data: Data) -> datasets.Dataset:
    """The split, of which nothing is used before its files were checked: Arrow's own readers trust what they map."""
    folder, where = Path(data.place), f"data.path {data.path}"
    with reading(f"{where} cannot be read as a saved Hugging Face dataset"):
        if (folder / "dataset_dict.json").exists():
            splits = json.loads(read_text(folder / "dataset_dict.json"))["splits"]
            if data.split not in splits:
                raise UserError(f"{where} has no split {data.split!r}: choose data.split of {splits}")
            folder /= data.split
        state = json.loads(read_text(folder / "state.json"))
        if folder == Path(data.place) and data.split not in (DEFAULT_SPLIT, str(state["_split"])):
            raise UserError(f"{where} holds one data set without splits: leave data.split away")
        names = [entry["filename"] for entry in state["_data_files"]]
        if not names:
            raise UserError(f"{where} has a split without images: save it again with some")
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file of its folder")
            check_arrow(folder / name)
        return datasets.Dataset.load_from_disk(folder)


def check_arrow(file: Path) -> None:
    """Raise an error if a table in either of Arrow's formats is damaged: offsets in it may point to any memory.

    The bytes of images are not looked at: 2 ms for 100,000 rows.
    """
    require_regular(file)
    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            whole = pyarrow.ipc.open_file(source)
            batches = (whole.get_batch(number) for number in range(whole.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        for batch in batches:
            batch.validate(full=True)


def first_column(columns: list[str], names: tuple[str, ...], what: str, data: Data, *, where: str = "") -> str:
    """The first of `names` that is a column. Raises a UserError if none is."""
    if found := [name for name in names if name in columns]:
        return found[0]
    raise UserError(
        f"{where or f'data.path {data.path}'} has the columns {columns}; {what} is looked for in "
        f"{' or '.join(repr(name) for name in names)}: rename a column"
    )


def caption_column(columns: list[str], data: Data, *, where: str = "") -> str:
    """The column of the captions. Raises a UserError if there is none."""
    names = CAPTION_KEYS if data.caption_key is None else (data.caption_key,)
    return first_column(columns, names, "a caption", data, where=where)


def captioned_rows(rows: datasets.Dataset, data: Data) -> tuple[datasets.Dataset, Captions, list[int]]:
    """The rows that have captions, those, and the numbers of the rows; rows without are left out and counted."""
    column = caption_column(rows.column_names, data)
    texts: list[list[str]] = []
    kept: list[int] = []
    left_out = LeftOut(data)
    for batch in rows.select_columns([column]).with_format(None).iter(TEXT_AT_ONCE):
        for value in batch[column]:
            where = f"row {len(texts)} of data.path {data.path}"
            texts.append(texts_in(value, where))
            if texts[-1]:
                kept.append(len(texts) - 1)
            else:
                left_out.note(f"{where} has no caption in {column!r}")
    left_out.tell()
    if not kept:
        raise UserError(f"data.path {data.path} has no row with a caption in {column!r}: check data.caption_key")
    rows = rows if len(kept) == len(texts) else rows.select(kept)
    return rows, Captions([texts[row] for row in kept]), kept


def _read_labels(rows: datasets.Dataset, column: str, data: Data) -> np.ndarray:
    """Labels [N] int64, read at once: 10 MB for a million images."""
    labels = rows.select_columns([column]).with_format("arrow")[:].column(0)
    if not pyarrow.types.is_integer(labels.type):
        raise UserError(f"column {column!r} of data.path {data.path} holds {labels.type}: labels must be integers")
    if labels.null_count:
        row = labels.is_null().index(True).as_py()
        raise UserError(f"row {row} of data.path {data.path} has no {column!r}: label it or remove it")
    return labels.to_numpy()


def _undecoded(rows: datasets.Dataset, column: str, data: Data) -> datasets.Dataset:
    """Rows whose image column gives a path, bytes, or both as stored."""
    feature: Any = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False)).with_format(None)
    is_struct = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    is_value = isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_") in ("string", "binary")
    if not (is_struct or is_value):
        raise UserError(
            f"column {column!r} of data.path {data.path} holds {feature}: it must hold images, paths, or encoded bytes"
        )
    return rows.with_format(None)
