"""A tiny GPT and images, shared by the tests of rollouts."""

import pytest
import torch

from grpo.data import ImageBatch
from grpo.models import GPT, ClassCondition, GPTConfig


@pytest.fixture
def model():
    """2 layers x 32, 16 tokens of 64 codes, 5 classes; the output layer is made peaked so that tokens matter."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=64, block_size=16, num_classes=5)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
    return model


@pytest.fixture
def batch():
    """6 images; their codes are a function of the image, as a tokenizer's are."""
    ids = torch.arange(100, 106)
    return ImageBatch(torch.rand(6, 3, 8, 8), ClassCondition(torch.arange(6) % 5), ids, ids)


@pytest.fixture
def encode():
    """Stands in for the tokenizer."""
    return lambda batch: (batch.images.flatten(1)[:, :16] * 64).long().clamp(max=63)
