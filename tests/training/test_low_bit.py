"""The optimizer with moments of 8 bits."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from grpo.checkpoint.state import optimizer_tensors
from grpo.config import Optimizer, UserError
from grpo.formats import read_tensors
from grpo.jobs.train_grpo import main
from grpo.parallel import has_low_bit_state
from grpo.training import GuardedOptimizer

ROOT = Path(__file__).resolve().parents[2]
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False))


def trained(name, steps=6):
    model = network()
    optimizer = GuardedOptimizer(
        model, Optimizer(name=name, lr=1e-2, schedule="cosine"), total_steps=10, max_skipped_steps=2
    )
    with torch.compiler.set_stance("force_eager"):  # the library compiles its step, which takes a CPU half a minute
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.backward(model(torch.randn(16, 64)).square().mean())
            rate = optimizer.step()["lr"]
    return model, optimizer, rate


@needs_torchao
def test_it_goes_where_adamw_goes():
    start, (exact, _, rate), (low, optimizer, low_rate) = network(), trained("adamw"), trained("adamw_8bit")
    assert rate == low_rate < 1e-2
    assert optimizer.adamw.param_groups[0]["lr"].item() == pytest.approx(rate)
    for first, one, other in zip(*(side.parameters() for side in (start, exact, low)), strict=True):
        moved = (one - first).norm()
        assert moved > 0
        assert (one - other).norm() < 0.1 * moved


@needs_torchao
def test_its_state_has_a_quarter_of_the_memory_and_is_that_of_a_checkpoint():
    model, optimizer, _ = trained("adamw_8bit")
    tensors = optimizer_tensors(model, optimizer.adamw)
    assert tensors["state.0.weight.exp_avg.codes"].dtype == torch.uint8
    assert tensors["state.0.weight.exp_avg.scale"].shape == (64 * 128 // 256,)
    assert tensors["state.1.weight.exp_avg"].dtype == torch.float32
    matrices = sum(tensor.nbytes for name, tensor in tensors.items() if ".weight.exp_avg" in name and "1." not in name)
    assert matrices < 0.26 * 2 * 4 * sum(parameter.numel() for parameter in model.parameters())
    tensors["state.0.weight.exp_avg.codes"].zero_()  # they are the live ones
    state = optimizer.adamw.state[model[0].weight]["exp_avg"]
    assert state.dequantize().unique().numel() <= len(state.scale)


@pytest.mark.parametrize(
    ("shape", "is_low"),
    [((64, 256), True), ((63, 256), True), ((64, 100), True), ((63, 100), False), ((4, 256), False)],
)
def test_which_parameters(shape, is_low):
    assert has_low_bit_state(torch.empty(shape)) == is_low


@needs_torchao
def test_a_run_on_two_ranks_goes_on_bit_by_bit_and_on_one(tmp_path):
    flags = ["--config", "debug", "--optimizer.name", "adamw_8bit", "--metrics.image_interval", "0"]
    script = [str(ROOT / "tests/training/resume_eagerly_on_two_ranks.py"), str(tmp_path), *flags]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    whole, broken = (read_tensors(tmp_path / run / "checkpoints/step-000002") for run in ("whole", "broken"))
    assert any(name.endswith(".codes") for name in whole)
    assert_close(broken, whole, rtol=0, atol=0)
    with torch.compiler.set_stance("force_eager"):
        main([*flags, "--training.steps", "3", "--metrics.run_dir", str(tmp_path / "whole")])
    assert len((tmp_path / "whole/metrics.jsonl").read_text().splitlines()) == 3


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"pip install 'autoregressive-grpo\[low-bit\]'"):
        GuardedOptimizer(network(), Optimizer(name="adamw_8bit"), total_steps=1, max_skipped_steps=1)
