"""Ways to run a training recipe: in this process, or under torchrun."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.__main__ import JOBS
from grpo.config import RECIPES, load_recipe
from grpo.parallel import distributed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_here():
    """run_here(job, "--key", value, ...): the job as a run of one process; returns its lines of metrics."""

    def run(job, *flags):
        recipe = load_recipe(RECIPES[job], [str(flag) for flag in flags])
        with distributed(60) as world:
            importlib.import_module(f"grpo.jobs.{JOBS[job]}").train(recipe, world)
        return read_metrics(recipe.run_dir)

    return run


@pytest.fixture
def run_on_two():
    """run_on_two(job, "--key", value, ...): the same under torchrun with two processes."""

    def run(job, *flags):
        flags = [str(flag) for flag in flags]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        result = subprocess.run(
            [*launcher, "-m", "grpo", job, *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr
        return read_metrics(load_recipe(RECIPES[job], flags).run_dir)

    return run


def read_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
