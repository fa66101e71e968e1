"""Start a script under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(ranks: int, script: str, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess:
    """Run a script of the repository on some ranks of this host, from the repository's root."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        f"--max-restarts={restarts}",
    ]
    return subprocess.run(
        [sys.executable, *launcher, script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def run_two_ranks(script: str, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess:
    """The same on two ranks."""
    return run_ranks(2, script, *arguments, restarts=restarts)
