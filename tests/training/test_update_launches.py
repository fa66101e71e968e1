"""How many kernels and copies a whole step launches around the blocks, counted in the step itself without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, PARAMETERS, PARTS = 48, 48 * 7 + 4, 4  # of GPT-XXL; micro-batches of 32 of the published run's 128 images


@pytest.mark.skipif(not torch.__version__.startswith("2.15."), reason="the counts are those of FSDP2 in torch 2.15")
def test_a_step_of_the_published_run_on_one_gpu(tmp_path):
    """Rollout, update with dropout, AdamW. What the kernels of a block are is in `test_compiled_kernels.py`."""
    file = tmp_path / "count.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "benchmarks/count_update.py", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(file.read_text())
    assert counted["micro_batch_size"] == 32
    rollout, update, optimizer = (counted["phases"][name] for name in ("rollout", "update", "optimizer"))
    assert [phase["blocks forward"] for phase in (rollout, update)] == [PARTS * BLOCKS] * 2
    assert update["blocks backward"] == PARTS * BLOCKS
    assert [phase["reads"] for phase in (rollout, update, optimizer)] == [0, 0, 1]  # the norm of the gradient
    assert rollout["copies"] <= 2 * PARAMETERS + 24  # weights are cast once, one by one, for all micro-batches
    assert rollout["around"] <= 2 * PARAMETERS + 29 * PARTS
    assert update["copies"] <= PARAMETERS + 19 * PARTS  # the first micro-batch's gradients become fp32
    added = PARAMETERS * (PARTS - 1)  # those of the others are added to them
    assert added <= counted["operations"]["update"]["add_"] <= added + PARTS
    assert update["around"] <= PARAMETERS * PARTS + 100 * PARTS
    assert counted["operations"]["update"]["uniform"] == PARTS  # conditions that are dropped: one draw, no arithmetic
    assert "bitwise_xor" not in counted["operations"]["update"]
    assert (optimizer["around"], optimizer["copies"]) == (12, 0)
