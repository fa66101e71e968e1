"""How many kernels the compiled parts of a training step launch on a GPU, counted in generated code without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.15."), reason="the counts, and the ways into Inductor, are those of torch 2.15"
)


@pytest.mark.parametrize("part", ["block", "decoder"])
def test_a_step_of_the_published_run_launches_few_kernels(part, tmp_path):
    """GPT-XXL at 384 pixels with dropout, 32 images; the decoder of its rewards. No copy stands alone."""
    file = tmp_path / "count.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/count_compiled.py", "--parts", part, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(file.read_text())
    if part == "block":
        forward, backward = counted["block forward"], counted["block backward"]
        assert (forward["mm"], forward["attention"], forward["dropout"]) == (5, 1, 2)
        assert sum(forward.values()) <= 13
        assert (backward["mm"], backward["attention_backward"], backward["dropout"]) == (10, 1, 2)
        assert sum(backward.values()) <= 18
    else:
        assert counted["decoder"]["convolution"] == 42
        assert sum(counted["decoder"].values()) <= 156
    assert not {"copy_", "clone"} & {name for counter in counted.values() for name in counter}
