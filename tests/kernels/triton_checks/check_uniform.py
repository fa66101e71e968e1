"""The Triton kernel of `philox_uniform` beside its reference. Run by `test_triton.py`."""

import pytest
import torch

from grpo.kernels import Dropout, philox_uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.tensor([5, 2**40 + 3, -2, 0], device=DEVICE)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 575, 2300])
@pytest.mark.parametrize("keys", [{"seed": 3}, {"seed": 2**62 + 5, "step": 2**31}, {"seed": 0, "step": 257}], ids=str)
def check_equals_the_reference(count, keys):
    ours, reference = (philox_uniform(IDS, count, impl=impl, **keys) for impl in ("triton", "reference"))
    assert ours.shape == (4, count)
    assert torch.equal(ours, reference)


def check_rows_that_are_not_adjacent():
    ours, reference = (philox_uniform(IDS[::2], 3, seed=1, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(ours, reference)
    assert philox_uniform(IDS[:0], 3, seed=1, impl="triton").shape == (0, 3)


def check_the_same_rows_are_dropped():
    ids = torch.arange(1000, device=DEVICE)
    ours, reference = (Dropout(ids, seed=4, impl=impl).rows(0.1, place=2) for impl in ("triton", "reference"))
    assert 50 < ours.sum() < 150
    assert torch.equal(ours, reference)
