"""The choice between kernels and references."""

import logging

import pytest
import torch

from grpo.kernels.dispatch import use_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    """As on a machine whose kernels are not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_takes_the_reference_without_a_gpu_and_says_nothing(caplog):
    assert not use_triton("auto", op="op", device=CPU, obstacle=None)
    assert not use_triton("auto", op="op", device=CPU, obstacle="rows too long")
    assert not caplog.records


def test_inputs_that_a_kernel_cannot_take_are_logged_once(caplog):
    pytest.importorskip("triton")
    with caplog.at_level(logging.WARNING):
        assert use_triton("auto", op="op", device=GPU, obstacle=None)
        for _ in range(3):
            assert not use_triton("auto", op="op", device=GPU, obstacle="rows too long")
    assert [record.message for record in caplog.records] == ["op uses the torch reference: rows too long"]


def test_triton_insists():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="op cannot run its Triton kernels: rows too long"):
        use_triton("triton", op="op", device=GPU, obstacle="rows too long")
    with pytest.raises(ValueError, match="not on a GPU"):
        use_triton("triton", op="op", device=CPU, obstacle=None)
    assert not use_triton("reference", op="op", device=GPU, obstacle=None)
    with pytest.raises(ValueError, match="impl is 'fast'; it must be one of auto, triton, reference"):
        use_triton("fast", op="op", device=CPU, obstacle=None)
