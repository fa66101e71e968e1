"""Damaged and missing files: named, counted, replaced, limited."""

import logging

import pytest
import torch

from grpo.config import UserError
from grpo.data import UnreadableImage, build_dataset, build_stream
from grpo.parallel import World

COUNT = 12


@pytest.fixture
def damaged(class_folders, section):
    """Builds a data set of 12 images of which some are damaged."""
    path = class_folders(["a"], COUNT) / "a"

    def build(bad: list[int], *, max_bad_images: int = 100):
        for index in bad:
            file = path / f"{index:03d}.png"
            file.write_bytes(file.read_bytes()[:200] if index % 2 else b"no picture")  # truncated, or not an image
        return build_dataset(section(path.parent, max_bad_images=max_bad_images), num_classes=1)

    return build


def stream_of(dataset, *, num_workers=0, rank=0, world_size=1):
    world = World(rank, world_size, rank, world_size, torch.device("cpu"))
    return build_stream(dataset, batch_size=4, seed=3, num_workers=num_workers, world=world)


def order_of(dataset, steps, **keys) -> dict[int, int]:
    stream = stream_of(dataset, **keys)
    batches = [next(stream) for _ in range(steps)]
    assert torch.cat([batch.sample_ids.diff() for batch in batches]).eq(1).all()
    return {
        number: index
        for batch in batches
        for number, index in zip(batch.sample_ids.tolist(), batch.indices.tolist(), strict=True)
    }


@pytest.mark.parametrize(("index", "words"), [(0, "is not an image"), (1, "cannot be read: image file is truncated")])
def test_reading_one_names_the_file(damaged, index, words):
    with pytest.raises(UnreadableImage, match=rf"a/{index:03d}\.png {words}") as caught:
        damaged([index])[index]
    assert "\n" not in str(caught.value)


def test_missing_file_and_empty_row_of_a_saved_dataset(saved_dataset, section):
    path = saved_dataset({"image": ["gone.png", None], "label": [0, 0]})
    dataset = build_dataset(section(path), num_classes=1)
    with pytest.raises(UnreadableImage, match=r"image 0 \(gone\.png\) of split 'train' .*No such file"):
        dataset[0]
    with pytest.raises(UnreadableImage, match=r"image 1 of split 'train' .*'image' is empty"):
        dataset[1]


def test_next_readable_image_of_the_order_takes_the_place(damaged, caplog):
    whole = order_of(damaged([]), 3)
    order = [whole[number] for number in range(COUNT)]
    bad = [order[2], order[3], order[11]]
    dataset = damaged(bad)
    expected = list(order)
    expected[2] = expected[3] = order[4]
    expected[11] = order[0]  # the order is a ring
    with caplog.at_level(logging.WARNING):
        found = order_of(dataset, 3)
    assert [found[number] for number in range(COUNT)] == expected
    assert len(dataset.unreadable) == len(caplog.records) == 3
    assert all(f"{index:03d}.png" in record.message for index, record in zip(bad, caplog.records, strict=True))


def test_replacement_does_not_depend_on_ranks_workers_or_start(damaged):
    dataset = damaged([1, 4, 5, 8])
    whole = order_of(dataset, 6)
    ranks = [order_of(dataset, 6, num_workers=1, rank=rank, world_size=2) for rank in range(2)]
    assert ranks[0] | ranks[1] == whole
    late = stream_of(dataset, num_workers=2)
    late.load_state_dict({"samples": 13})
    batch = next(late)
    assert batch.indices.tolist() == [whole[number] for number in range(13, 17)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_bad_image_counts_once(damaged, num_workers):
    dataset = damaged([0, 1, 2], max_bad_images=3)
    order_of(dataset, 12, num_workers=num_workers)
    assert len(dataset.unreadable) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_line_stops_the_run_beyond_the_limit(damaged, num_workers):
    dataset = damaged([0, 1, 2, 3], max_bad_images=3)
    with pytest.raises(UserError) as caught:
        order_of(dataset, 12, num_workers=num_workers)
    message = str(caught.value)
    assert "4 unreadable images, more than data.max_bad_images = 3" in message
    assert ".png" in message
    assert "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_readable(damaged, num_workers):
    with pytest.raises(UserError, match=r"none of the 12 images .* can be read; the last: .*\.png"):
        order_of(damaged(list(range(COUNT))), 1, num_workers=num_workers)


def test_limit_of_zero_stops_at_the_first(damaged):
    with pytest.raises(UserError, match=r"1 unreadable images, more than data\.max_bad_images = 0"):
        order_of(damaged([7], max_bad_images=0), 3)
