"""Start a script under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_two_ranks(script: str, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess:
    """Run a script of the repository on two ranks, from the repository's root."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    return subprocess.run(
        [sys.executable, *launcher, script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
