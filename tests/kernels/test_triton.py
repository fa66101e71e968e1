"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time for four targets.

The interpreter must be on before a kernel is imported, and off for the compiler: both work in processes of their own.
With a GPU the same checks run on it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKS = sorted(path.name for path in (HERE / "triton_checks").glob("check_*.py"))
# Shared memory that one block may use, bytes.
TARGETS = {"cuda:80": 166_912, "cuda:90": 232_448, "cuda:100": 232_448, "hip:gfx942": 65_536}
MATRIX_KERNELS = {"linear_768", "linear_3200"} | {
    f"{name}_{rows}" for name in ("norm_linear", "linear_add") for rows in (16, 32)
}


def run(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_equal_their_references(check):
    arguments = [
        "-m",
        "pytest",
        f"tests/kernels/triton_checks/{check}",
        "-o",
        "python_functions=check_*",
        "-W",
        "ignore",
    ]
    done = run(*arguments, TRITON_INTERPRET="0" if torch.cuda.is_available() else "1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target):
    done = run("tests/kernels/compile_kernels.py", target, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    for name, used in json.loads(done.stdout).items():
        assert used["stack"] == 0, f"{name} spills {used} on {target}"
        assert used["shared"] <= TARGETS[target], f"{name} takes {used['shared']} bytes of shared memory on {target}"
        assert used["matrix"] == (name in MATRIX_KERNELS), f"{name} and tensor cores on {target}: {used}"
        if name == "ratio_loss":
            assert not used.get("drops_nan"), f"a minimum or maximum of {name} drops NaN on {target}"
