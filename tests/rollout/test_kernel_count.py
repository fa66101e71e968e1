"""How many kernels a sampling step launches on a GPU, counted without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_step_of_the_largest_published_run_launches_few_kernels(tmp_path):
    """GPT-XXL at 384 pixels with guidance; `shared` is what large models get whose weights are not copied."""
    file = tmp_path / "count.json"
    sides = ("fused", "library", "shared")
    command = ["benchmarks/count_kernels.py", "--preset", "GPT-XXL", "--json", str(file), "--sides", *sides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(file.read_text())["sides"]
    assert {side: counted[side]["block"] for side in sides} == {"fused": 5, "library": 8, "shared": 9}
    assert counted["fused"]["step"] <= 260
    assert counted["library"]["step"] <= 400
    assert counted["fused"]["operations"]["cached_attention"] == 48
    assert counted["library"]["operations"]["mm"] == 4 * 48 + 1
