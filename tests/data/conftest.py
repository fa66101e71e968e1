"""Small data sets on disk."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from grpo.config import Data


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
