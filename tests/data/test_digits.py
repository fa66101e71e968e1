"""The digits that ship with the project."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo.data
from grpo.config import UserError
from grpo.data import build_dataset
from grpo.data.builtin import SPLITS

FOLDER = Path(grpo.data.__file__).parent


@pytest.fixture
def digits(section):
    return lambda split, **keys: build_dataset(
        section(name="digits", split=split, image_size=32, **keys), num_classes=10
    )


def keys_of(dataset) -> list[bytes]:
    return [dataset.pixels(i).numpy().tobytes() for i in range(len(dataset))]


def test_file_is_the_subset_that_its_note_describes():
    with np.load(FOLDER / "digits.npz", allow_pickle=False) as archive:
        digest = hashlib.sha256(archive["images"].tobytes() + archive["labels"].tobytes()).hexdigest()
    assert digest == "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
    assert "Redistributions" in (FOLDER / "digits.txt").read_text()


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_balanced_in_every_prefix(digits, split):
    dataset = digits(split)
    assert len(dataset) == 10 * len(SPLITS[split])
    assert dataset.class_ids[:20].tolist() == [*range(10), *range(10)]
    assert np.bincount(dataset.class_ids).tolist() == [len(SPLITS[split])] * 10


def test_splits_are_disjoint_and_add_up(digits):
    parts = {split: set(keys_of(digits(split))) for split in ("train_a", "train_b", "validation", "test")}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 5000  # every digit once
    assert set(keys_of(digits("train"))) == parts["train_a"] | parts["train_b"]
    assert set(keys_of(digits("heldout"))) == parts["validation"] | parts["test"]


def test_image_is_padded_gray_in_rgb(digits):
    dataset = digits("train")
    image, class_id = dataset[7]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert class_id == 7
    assert dataset.class_names == list("0123456789")
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert (image[:, :2] == -1).all()
    assert (image[:, :, -2:] == -1).all()
    assert image.max() > 0.9


def test_other_sizes_are_scaled(digits, section):
    dataset = build_dataset(section(name="digits", image_size=64), num_classes=10)
    assert dataset[0][0].shape == (3, 64, 64)


def test_unknown_split_lists_the_splits(digits):
    with pytest.raises(UserError, match=r"'dev' .*train_a.*heldout"):
        digits("dev")


def test_too_few_classes_for_the_digits(section):
    with pytest.raises(UserError, match=r"label 5 .*outside 0\.\.4.*set num_classes"):
        build_dataset(section(name="digits"), num_classes=5)
