"""A small tokenizer, and what rewards are built from."""

import pytest
import torch

from grpo.models import TOKENIZER_SPECS, VQModel
from grpo.rewards import RewardContext


@pytest.fixture(scope="session")
def tokenizer():
    torch.manual_seed(0)
    return VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=32)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def context(tokenizer):
    """Four classes, fp32 on the CPU."""
    return RewardContext(tokenizer, torch.device("cpu"), torch.float32, ["cat", "dog", "fish", "bird"])
