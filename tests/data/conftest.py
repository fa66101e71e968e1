"""Small data sets on disk."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grpo.config import Data
from grpo.data import ImageBatch


@pytest.fixture
def make_images() -> Callable[[int], list[Image.Image]]:
    """Distinct images of 20x24 pixels; the red value of image i is i everywhere."""

    def make(count: int) -> list[Image.Image]:
        images = []
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            pixels[..., 0] = i
            images.append(Image.fromarray(pixels))
        return images

    return make


@pytest.fixture
def class_folders(tmp_path: Path, make_images) -> Callable[..., Path]:
    """A folder of class folders, `per_class` PNG images each."""

    def make(names: list[str], per_class: int, *, inside: str = "") -> Path:
        images = iter(make_images(len(names) * per_class))
        for name in names:
            (tmp_path / "folders" / inside / name).mkdir(parents=True)
            for i in range(per_class):
                next(images).save(tmp_path / "folders" / inside / name / f"{i:03d}.png")
        return tmp_path / "folders"

    return make


@pytest.fixture
def saved_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Saves columns as a Hugging Face dataset, in a split or, with split None, alone."""

    def make(
        columns: dict,
        *,
        split: str | None = "train",
        features: datasets.Features | None = None,
        shards: dict[str, int] | None = None,
    ) -> Path:
        rows = datasets.Dataset.from_dict(columns, features=features)
        saved = rows if split is None else datasets.DatasetDict({split: rows})
        saved.save_to_disk(tmp_path / "saved", num_shards=shards)
        return tmp_path / "saved"

    return make


@pytest.fixture
def section() -> Callable[..., Data]:
    """A data section for images of 16 pixels."""

    def make(path: Path | None = None, **keys) -> Data:
        return Data(path=None if path is None else str(path), **{"image_size": 16, **keys})

    return make


SHARD = 8  # images of a file, of 23


@pytest.fixture
def encoded() -> Callable[[Image.Image], bytes]:
    """An image as a PNG file."""

    def encode(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_tar() -> Callable[[Path, Iterable[tuple[str, bytes]]], Path]:
    """A tar file of members, last changed long ago."""

    def write(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        os.utime(path, (1_500_000_000, 1_500_000_000))
        return path

    return write


@pytest.fixture
def tars(tmp_path: Path, make_images, encoded, write_tar) -> Callable[..., Path]:
    """WebDataset shards of 23 images, image i of class i mod 3, with other members between; in a folder."""

    def make(label=lambda index: ("cls", str(index % 3))) -> Path:
        images = make_images(23)
        for shard, start in enumerate(range(0, 23, SHARD)):
            members = []
            for index in range(start, min(start + SHARD, 23)):
                ending, text = label(index)
                key = f"./part/{index:05d}"
                members += [(f"{key}.{ending}", text.encode()), (f"{key}.v1.PNG.txt", b"-")]
                members += [(f"{key}.PNG", encoded(images[index]))]
            write_tar(tmp_path / "tars" / f"images-train-{shard:03d}.tar", members)
        return tmp_path / "tars"

    return make


@pytest.fixture
def parquet(tmp_path: Path, make_images, encoded) -> Callable[..., Path]:
    """The same images in Parquet files of two row groups each; a column is replaced by a function of the index."""

    def make(folder: str = "parquet", **columns) -> Path:
        images = make_images(23)
        (tmp_path / folder).mkdir(exist_ok=True)
        for shard, start in enumerate(range(0, 23, SHARD)):
            rows = range(start, min(start + SHARD, 23))
            stored = [{"bytes": encoded(images[index]), "path": None} for index in rows]
            table = {"image": stored, "label": [index % 3 for index in rows], "extra": ["x"] * len(rows)}
            table |= {name: [value(index) for index in rows] for name, value in columns.items()}
            table = {name: values for name, values in table.items() if values[0] is not None}
            path = tmp_path / folder / f"train-{shard:05d}-of-00003.parquet"
            pq.write_table(pa.table(table), path, row_group_size=5)
        return tmp_path / folder

    return make


@pytest.fixture
def numbered_images() -> Callable[[Iterable[ImageBatch]], dict[int, tuple[int, int]]]:
    """Sample number -> red value, which tells the image of `make_images`, and class."""

    def number(batches: Iterable[ImageBatch]) -> dict[int, tuple[int, int]]:
        found = {}
        for batch in batches:
            red = batch.images[:, 0, 0, 0].tolist()
            pairs = zip(red, batch.condition.class_ids.tolist(), strict=True)
            found |= dict(zip(batch.sample_ids.tolist(), pairs, strict=True))
        return found

    return number
