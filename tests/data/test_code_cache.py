"""The cache returns what the encoder would, and spares it the work."""

import pytest
import torch

from grpo.data import CodeCache, ImageBatch, build_dataset, build_stream
from grpo.models import ClassCondition
from grpo.parallel import World

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def batch_of(images: torch.Tensor, indices: torch.Tensor | None = None) -> ImageBatch:
    ids = torch.zeros(len(images), dtype=torch.int64)
    return ImageBatch(images, ClassCondition(ids), ids, indices)


class Encoder:
    """Codes by the mean colour of 2x2 patches; counts the images that it sees."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self.images = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        patches = torch.nn.functional.avg_pool2d(images.mean(dim=1), 2).flatten(1)  # [B, T]
        return ((patches + 1) / 2 * (self.codebook_size - 1)).long()


@pytest.fixture
def dataset(class_folders, section):
    return build_dataset(section(class_folders(["a"], 10)), num_classes=1)


@pytest.mark.parametrize("codebook_size", [256, 2**15, 2**15 + 1, 2**20])
def test_cached_equals_encoded(dataset, codebook_size):
    encoder, uncached = Encoder(codebook_size), Encoder(codebook_size)
    cache = CodeCache(encoder, num_images=len(dataset), codebook_size=codebook_size, enabled=True)
    stream = build_stream(dataset, batch_size=4, seed=0, num_workers=0, world=WORLD)
    for _ in range(10):  # four epochs, with batches of known and new images
        batch = next(stream)
        codes = cache.codes(batch)
        assert codes.dtype == torch.int64
        assert torch.equal(codes, uncached(batch.images))
    assert encoder.images == 10
    assert uncached.images == 40


def test_largest_code_survives():
    cache = CodeCache(lambda images: torch.tensor([[2**15 - 1, 0]]), num_images=1, codebook_size=2**15, enabled=True)
    batch = batch_of(torch.zeros(1, 3, 2, 2), torch.tensor([0]))
    assert [cache.codes(batch).tolist() for _ in range(2)] == [[[2**15 - 1, 0]]] * 2


def test_one_image_twice_in_a_batch(dataset):
    cache = CodeCache(Encoder(256), num_images=len(dataset), codebook_size=256, enabled=True)
    image = dataset[3][0]
    codes = cache.codes(batch_of(torch.stack([image, image]), torch.tensor([3, 3])))
    assert torch.equal(codes, Encoder(256)(torch.stack([image, image])))


def test_switched_off_encodes_every_batch(dataset):
    encoder = Encoder(256)
    cache = CodeCache(encoder, num_images=len(dataset), codebook_size=256, enabled=False)
    images = torch.stack([dataset[0][0]])
    for _ in range(3):
        assert torch.equal(cache.codes(batch_of(images)), Encoder(256)(images))
    assert encoder.images == 3
