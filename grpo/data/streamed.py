"""A data set whose rows come one after the other, through `datasets`' streaming."""

import io
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from PIL import Image

from grpo.config import Data, UserError, innermost, reason, text_lines
from grpo.data.captions import CaptionRequests, Captions, texts_in, texts_of
from grpo.data.dataset import ImageDataset, decoded
from grpo.data.huggingface import IMAGE_COLUMNS, LABEL_COLUMNS, caption_column, check_arrow, first_column
from grpo.data.images import read_image
from grpo.data.index_cache import on_main_rank
from grpo.data.shard_files import shard_files
from grpo.data.tar_files import expand_braces
from grpo.data.unreadable import UnreadableImage
from grpo.data.webdataset import IMAGE_ENDINGS, JSON_KEYS

KINDS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
Row = TypeVar("Row")


class StreamedDataset(ImageDataset):
    """Rows of Parquet, tar or Arrow files, here or behind an address that `datasets` understands (hf://, https://).

    It has no length. Its `class_ids` are those of the source's named classes, as the model numbers them, and empty
    where labels are bare integers.

    Raises:
        UserError: no such files, or not such columns.
    """

    is_stream = True
    requests: CaptionRequests | None

    def __init__(self, *, data: Data, with_captions: bool = False) -> None:
        self.files = on_main_rank(partial(_files, data))
        suffixes = {Path(file).suffix for file in self.files}
        if len(suffixes) != 1 or not suffixes <= set(KINDS):
            kinds = f"ends in {', '.join(sorted(suffixes))}: a stream has files of one kind, {', '.join(KINDS)}"
            raise UserError(f"data.path {data.path} {kinds}")
        self._kind, self.data = KINDS[suffixes.pop()], data
        features = self._open(self.files).features
        columns = list(features or ())
        if self._kind == "webdataset":
            endings = {column.lower(): column for column in columns}
            self._image = endings[first_column(list(endings), IMAGE_ENDINGS, "an image", data)]
            wanted = ("txt", "json") if with_captions else ("cls", "json")
            self._label = endings[first_column(list(endings), wanted, "a label or caption", data)]
        else:
            self._image = first_column(columns, IMAGE_COLUMNS, "an image", data)
            label = caption_column(columns, data) if with_captions else None
            self._label = label or first_column(columns, LABEL_COLUMNS, "a label", data)
        if with_captions:
            super().__init__(np.empty(0), [], data=data, captions=Captions([]))
            return
        names = getattr(features[self._label], "names", [])  # a ClassLabel has them
        super().__init__(np.arange(len(names)), names, data=data)

    def identify(self) -> Iterable[bytes]:
        return (Path(file).name.encode() for file in self.files)

    def describe(self, index: int) -> str:
        return f"class {self.source_names[index]!r} of data.path {self.data.path}"

    def captions(self, condition: Any) -> list[str]:
        if self.captions_of is not None:
            return super().captions(condition)
        names = dict(enumerate(self.class_names))
        return [names.get(class_id, str(class_id)) for class_id in condition.class_ids.tolist()]

    def rows(self, seed: int, epoch: int, state: dict | None) -> datasets.IterableDataset:
        """The rows of an epoch, file by file in an order of its own, from a state on. Images are not decoded."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.files))
        rows = self._open([self.files[place] for place in order])
        if isinstance(rows.features[self._image], datasets.Image):
            rows = rows.cast_column(self._image, datasets.Image(decode=False))
        if state is not None:
            rows.load_state_dict(state)
        return rows

    def guarded(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows; what goes wrong in reading them is a UserError."""
        try:
            yield from rows
        except Exception as error:  # libraries of formats raise all kinds
            raise UserError(f"data.path {self.data.path} cannot be read on: {_reason(error)}") from error

    def image(self, row: dict) -> Image.Image:
        """The image of a row, in RGB. Raises `UnreadableImage`."""
        return decoded(lambda: self._read(row[self._image]), lambda: f"{_name(row, self._image)} of {self.data.path}")

    def _read(self, stored: Any) -> Image.Image:
        content = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(content, bytes):
            raise ValueError(f"its {self._image!r} has no encoded image")
        return read_image(io.BytesIO(content))

    def key(self, row: dict) -> int:
        """A number by which an unreadable image is counted once, though it comes again every epoch."""
        stored = row[self._image]
        return zlib.crc32(repr(stored).encode())

    def class_id(self, row: dict) -> int:
        """The model's class id of a row. Raises a UserError: no label, or one out of range."""
        label = row[self._label]
        if isinstance(label, dict):
            label = next((label[key] for key in JSON_KEYS if key in label), None)
        if not isinstance(label, int) or isinstance(label, bool):
            raise UserError(
                f"{_name(row, self._image)} of {self.data.path} has the label {label!r}: it must be an integer"
            )
        classes = len(self.class_ids) or self.num_classes or 2**31
        if not 0 <= label < classes:
            raise UserError(
                f"{_name(row, self._image)} of {self.data.path} has label {label}, outside 0..{classes - 1}: correct "
                "the label or num_classes"
            )
        return int(self.class_ids[label]) if len(self.class_ids) else label

    def texts(self, row: dict) -> list[str]:
        """The captions of a row. Raises `UnreadableImage` where there is none."""
        value, where = row[self._label], f"{_name(row, self._image)} of {self.data.path}"
        if isinstance(value, dict):
            found = texts_of(value, self.data.caption_key, where)
        else:
            is_file = self._kind == "webdataset" and isinstance(value, str)
            found = texts_in(text_lines(value.removeprefix("\ufeff")) if is_file else value, where)
        if not found:
            raise UnreadableImage(f"{where} has no caption")
        return found

    def _open(self, files: list[str]) -> datasets.IterableDataset:
        try:
            for file in files if self._kind == "arrow" else ():
                if "://" not in file:
                    check_arrow(Path(file))
            return datasets.load_dataset(self._kind, data_files={"rows": files}, split="rows", streaming=True)
        except Exception as error:
            raise UserError(f"data.path {self.data.path} cannot be read: {_reason(error)}") from error


def _files(data: Data) -> list[str]:
    """Files here, or addresses."""
    if "://" not in data.place:
        path, suffix = Path(data.place), Path(data.place).suffix
        if path.is_dir():
            folders = [path / data.split, path]
            found = [suffix for folder in folders for suffix in KINDS if any(folder.glob(f"*{suffix}"))]
            if not found:
                raise UserError(f"data.path {path} has no {', '.join(KINDS)} files: check the path")
            suffix = found[0]
        return [str(file) for file in shard_files(data, suffix)]
    try:
        patterns = expand_braces(data.place)
        return list(datasets.data_files.DataFilesList.from_patterns(patterns))
    except Exception as error:
        raise UserError(f"data.path {data.path} cannot be listed: {_reason(error)}") from error


def _name(row: dict, column: str) -> str:
    stored = row[column]
    path = stored.get("path") if isinstance(stored, dict) else None
    return f"image {row.get('__key__') or path or ''}".strip()


def _reason(error: BaseException) -> str:
    """What went wrong below the layers of the library, in one line."""
    return reason(innermost(error))
