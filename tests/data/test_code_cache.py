"""The cache returns what the encoder would, and spares it the work."""

import pytest
import torch

from grpo.data import CodeCache, ImageBatch, build_dataset, build_stream
from grpo.models import ClassCondition, VQConfig
from grpo.parallel import World

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def batch_of(images: torch.Tensor, indices: torch.Tensor | None = None) -> ImageBatch:
    ids = torch.zeros(len(images), dtype=torch.int64)
    return ImageBatch(images, ClassCondition(ids), ids, indices)


class Tokenizer:
    """Codes by the mean colour of 2x2 patches; counts the images that it sees."""

    def __init__(self, codebook_size: int) -> None:
        self.config = VQConfig(codebook_size=codebook_size)
        self.images = 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        patches = torch.nn.functional.avg_pool2d(images.mean(dim=1), 2).flatten(1)  # [B, T]
        return ((patches + 1) / 2 * (self.config.codebook_size - 1)).long()


@pytest.fixture
def dataset(class_folders, section):
    return build_dataset(section(class_folders(["a"], 10)), num_classes=1)


@pytest.mark.parametrize("codebook_size", [256, 2**15, 2**15 + 1, 2**20])
def test_cached_equals_encoded(dataset, codebook_size):
    tokenizer, uncached = Tokenizer(codebook_size), Tokenizer(codebook_size)
    cache = CodeCache(tokenizer, num_images=len(dataset), enabled=True)
    stream = build_stream(dataset, batch_size=4, seed=0, num_workers=0, world=WORLD)
    for _ in range(10):  # four epochs, with batches of known and new images
        batch = next(stream).to("cpu")
        codes = cache.codes(batch)
        assert codes.dtype == torch.int64
        assert torch.equal(codes, uncached.encode(batch.images))
    assert tokenizer.images == 10
    assert uncached.images == 40


def test_largest_code_survives():
    tokenizer = Tokenizer(2**15)
    tokenizer.encode = lambda images: torch.tensor([[2**15 - 1, 0]])
    cache = CodeCache(tokenizer, num_images=1, enabled=True)
    batch = batch_of(torch.zeros(1, 3, 2, 2), torch.tensor([0]))
    assert [cache.codes(batch).tolist() for _ in range(2)] == [[[2**15 - 1, 0]]] * 2


def test_one_image_twice_in_a_batch(dataset):
    cache = CodeCache(Tokenizer(256), num_images=len(dataset), enabled=True)
    image = dataset[3][0]
    codes = cache.codes(batch_of(torch.stack([image, image]), torch.tensor([3, 3])))
    assert torch.equal(codes, Tokenizer(256).encode(torch.stack([image, image])))


def test_switched_off_encodes_every_batch(dataset):
    tokenizer = Tokenizer(256)
    cache = CodeCache(tokenizer, num_images=len(dataset), enabled=False)
    images = torch.stack([dataset[0][0]])
    for _ in range(3):
        assert torch.equal(cache.codes(batch_of(images)), Tokenizer(256).encode(images))
    assert tokenizer.images == 3
