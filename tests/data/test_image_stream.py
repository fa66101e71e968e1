"""Order, sharing among ranks and workers, and resuming of the stream."""

import numpy as np
import pytest
import torch

from grpo.config import UserError
from grpo.data import ImageBatch, build_dataset, build_stream
from grpo.parallel import World


@pytest.fixture
def dataset(class_folders, section):
    """23 images, a prime, so that no batch fits."""
    path = class_folders(["a"], 23)
    return build_dataset(section(path), num_classes=1)


def stream_of(dataset, *, batch_size=4, seed=0, num_workers=0, rank=0, world_size=1):
    world = World(rank, world_size, rank, world_size, torch.device("cpu"))
    return build_stream(dataset, batch_size=batch_size, seed=seed, num_workers=num_workers, world=world)


def samples_of(batches: list[ImageBatch]) -> dict[int, int]:
    """Sample number -> data set index; every number once."""
    numbers = torch.cat([batch.sample_ids for batch in batches]).tolist()
    assert len(numbers) == len(set(numbers))
    return dict(zip(numbers, torch.cat([batch.indices for batch in batches]).tolist(), strict=True))


def fields(batch: ImageBatch) -> list[torch.Tensor]:
    return [batch.images, batch.condition.class_ids, batch.sample_ids, batch.indices]


def take(stream, count) -> list[ImageBatch]:
    return [next(stream) for _ in range(count)]


def test_batch_holds_what_the_data_set_holds(section):
    dataset = build_dataset(section(name="synthetic"), num_classes=7)
    batch = next(stream_of(dataset, batch_size=5))
    assert batch.images.shape == (5, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    batch = batch.to("cpu")
    assert batch.images.dtype == torch.float32
    assert {ids.dtype for ids in (batch.condition.class_ids, batch.sample_ids, batch.indices)} == {torch.int64}
    assert batch.sample_ids.tolist() == [0, 1, 2, 3, 4]
    for image, class_id, index in zip(batch.images, batch.condition.class_ids, batch.indices, strict=True):
        assert torch.equal(image, dataset[index][0])
        assert class_id == dataset[index][1]


def test_every_epoch_covers_the_data_in_another_order(dataset):
    samples = samples_of(take(stream_of(dataset), 12))  # 48 samples, two epochs and a bit
    first = [samples[number] for number in range(23)]
    second = [samples[number] for number in range(23, 46)]
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


def test_seed_and_epoch_do_not_add_up(dataset):
    second_of_zero = [samples_of(take(stream_of(dataset, seed=0), 12))[number] for number in range(23, 46)]
    first_of_one = [samples_of(take(stream_of(dataset, seed=1), 6))[number] for number in range(23)]
    assert second_of_zero != first_of_one


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (2, 0), (3, 2)])
def test_order_does_not_depend_on_ranks_or_workers(dataset, world_size, num_workers):
    expected = take(stream_of(dataset, batch_size=12), 4)
    ranks = [
        take(stream_of(dataset, batch_size=12, num_workers=num_workers, rank=rank, world_size=world_size), 4)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(expected):
        for whole, *parts in zip(fields(batch), *(fields(batches[step]) for batches in ranks), strict=True):
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(("old_workers", "new_workers"), [(0, 2), (2, 0)])
def test_resume_in_mid_epoch_on_another_world(dataset, old_workers, new_workers):
    whole = samples_of(take(stream_of(dataset, batch_size=1), 68))
    old = [stream_of(dataset, batch_size=8, num_workers=old_workers, rank=rank, world_size=2) for rank in range(2)]
    before = samples_of([batch for stream in old for batch in take(stream, 4)])  # 32 samples, in the second epoch
    assert old[0].state_dict() == old[1].state_dict() == {"samples": 32}
    new = [stream_of(dataset, batch_size=9, num_workers=new_workers, rank=rank, world_size=3) for rank in range(3)]
    for stream in new:
        stream.load_state_dict(old[0].state_dict())
    after = samples_of([batch for stream in new for batch in take(stream, 4)])
    assert before | after == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_a_state_while_iterating(dataset, num_workers):
    stream = stream_of(dataset, num_workers=num_workers)
    batches = take(stream, 3)
    stream.load_state_dict({"samples": 4})
    for batch, again in zip(batches[1:], take(stream, 2), strict=True):
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.sample_ids, again.sample_ids)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_randomness_is_left_alone(dataset, num_workers):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    take(stream_of(dataset, num_workers=num_workers), 7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_no_more_workers_than_cores(dataset, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    stream = stream_of(dataset, num_workers=8)
    next(stream)
    assert stream.num_workers == 1


def test_data_set_smaller_than_a_batch(dataset):
    assert next(stream_of(dataset, batch_size=23)).indices.sort().values.tolist() == list(range(23))
    with pytest.raises(UserError, match=r"23 images, fewer than one batch of 24: lower .*training\.batch_size"):
        stream_of(dataset, batch_size=24, world_size=2)


def test_batch_that_the_ranks_cannot_share(dataset):
    with pytest.raises(UserError, match=r"batch of 8 images cannot be shared by 3 ranks: make it a multiple of 3"):
        stream_of(dataset, batch_size=8, world_size=3)


def test_batch_moves_between_devices(dataset):
    batch = next(stream_of(dataset)).to("meta")
    assert {field.device.type for field in batch[:3]} == {"meta"}
    assert batch.indices.device.type == "cpu"
    assert ImageBatch(*batch[:3]).to("meta").indices is None


def test_parts_are_the_batch(dataset):
    batch = next(stream_of(dataset, batch_size=5))
    parts = batch.parts(2)
    assert [len(part.images) for part in parts] == [2, 2, 1]
    for whole, *pieces in zip(fields(batch), *map(fields, parts), strict=True):
        assert torch.equal(torch.cat(pieces), whole)
    assert ImageBatch(*batch[:3]).parts(3)[1].indices is None


def test_pixels_cross_the_process_border_without_loss(dataset):
    batch = next(stream_of(dataset, num_workers=1))
    assert torch.equal(batch.images, torch.stack([dataset.pixels(int(index)) for index in batch.indices]))


def test_classes_without_images_are_streamed_like_images(section):
    """Every class once an epoch, in another order each; exact on resumption and on any number of ranks."""
    dataset = build_dataset(section(name="classes"), num_classes=5)
    whole = take(stream_of(dataset, batch_size=12, num_workers=2), 5)  # a batch has more rows than there are classes
    order = torch.cat([batch.condition.class_ids for batch in whole])
    epochs = order[:60].view(12, 5)
    assert (epochs.sort(dim=1).values == torch.arange(5)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    assert whole[0].images.shape == (12, 3, 0, 0)
    assert whole[0].captions == [str(class_id) for class_id in whole[0].condition.class_ids.tolist()]
    assert [part.rows for part in whole[0].parts(5)] == [5, 5, 2]
    ranks = [stream_of(dataset, batch_size=12, rank=rank, world_size=3) for rank in range(3)]
    for stream in ranks:
        stream.load_state_dict({"samples": 24})
    late = torch.cat([next(stream).condition.class_ids for stream in ranks])
    assert torch.equal(late, whole[2].condition.class_ids)
