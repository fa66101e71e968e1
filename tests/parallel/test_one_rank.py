from collections import Counter

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.models import GPT
from grpo.parallel import (
    clip_grad_norm,
    compute_dtype,
    distributed,
    full_state_dict,
    gathered,
    grad_scaler,
    gradient_sync,
    load_full_state_dict,
    mixed_precision_policy,
    precision,
    set_matmul_precision,
)
from tests.parallel.toy import CONFIG, loss_sum, make_batch, make_model, make_parallel, plain_gradients


@pytest.fixture(scope="module")
def world():
    with distributed(60) as world:
        yield world


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_fp32_is_the_plain_model_bit_for_bit(world, recompute):
    model = make_parallel(world, recompute=recompute)
    assert not isinstance(model, FSDPModule)
    gradient_sync(model, False)
    with gathered(model):
        pass
    tokens, class_ids = make_batch()
    (loss_sum(model, tokens, class_ids) / tokens.numel()).backward()
    expected = plain_gradients()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])
    torch.testing.assert_close(clip_grad_norm(model, 1e9), norm)


class CountOperations(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def test_what_is_recomputed(world):
    counts = {}
    for mode in ("none", "selective", "full"):
        model = make_parallel(world, recompute=mode)
        assert model.state_dict().keys() == make_model().state_dict().keys()
        with CountOperations() as counter:
            loss_sum(model, *make_batch()).backward()
        counts[mode] = counter.counts
    products, activations = ([counts[mode][name] for mode in counts] for name in ("mm", "silu"))
    assert products[0] == products[1] < products[2]
    assert activations[0] < activations[1] == activations[2]


@pytest.mark.parametrize("mixed_precision", ["fp32", "bf16"])
def test_weights_into_a_meta_model(world, mixed_precision):
    with torch.device("meta"):
        model = make_parallel(world, GPT(CONFIG), mixed_precision=mixed_precision)
    expected = make_model().state_dict()
    load_full_state_dict(model, expected, device=world.device)
    loaded = full_state_dict(model)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_only_fp16_scales_the_loss():
    cpu = torch.device("cpu")
    assert [grad_scaler(precision, cpu) for precision in ("fp32", "tf32", "bf16")] == [None] * 3
    assert grad_scaler("fp16", cpu).is_enabled()


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_is_what_the_device_multiplies(monkeypatch, native, dtype):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: native)
    assert compute_dtype("auto") == dtype
    assert mixed_precision_policy("auto", None).param_dtype == (dtype if native else None)


def test_fp32_means_no_tf32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for mixed_precision, expected in (("fp32", ("highest", False)), ("tf32", ("high", True))):
            set_matmul_precision(mixed_precision)
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
