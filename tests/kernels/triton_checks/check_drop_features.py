"""The Triton kernel of `drop_features` beside its reference. Run by `test_triton.py`."""

import pytest
import torch

from grpo.kernels import drop_features

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.tensor([5, 2**40 + 3, -2], device=DEVICE)


def both(x, rate=0.3, **keys):
    keys = {"row_ids": IDS[: len(x)], "seed": 2**62 + 5, "layer": torch.tensor(47, device=DEVICE), "place": 1, **keys}
    return [drop_features(x, rate, impl=impl, **keys) for impl in ("triton", "reference")]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 5, 32), (2, 3, 7), (1, 1, 1), (2, 40, 100), (3, 0, 8)], ids=str)
def check_equals_the_reference(shape, rate):
    generator = torch.Generator().manual_seed(0)
    ours, reference = both(torch.randn(shape, generator=generator).to(DEVICE), rate)
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("keys", [{"seed": 3}, {"layer": None}, {"place": 0}, {"seed": 0, "place": 255}], ids=str)
def check_other_keys(keys):
    ours, reference = both(torch.ones(3, 4, 16, device=DEVICE), **keys)
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def check_half_precision(dtype):
    """The interpreter cuts bf16 off instead of rounding it."""
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    torch.testing.assert_close(*both(x), rtol=2**-7, atol=0)
    assert torch.equal(*(out == 0 for out in both(x)))


def check_gradient_and_strides():
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE).transpose(0, 1)
    gradients = []
    for impl in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        drop_features(leaf, 0.4, row_ids=IDS, seed=1, impl=impl).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
