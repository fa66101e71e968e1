"""The published command of VA-π, as it is printed, on two processes; see `published_command.py` for what is small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import torch

from tests.config.test_reference_flags import PUBLISHED
from tests.recipes.published_command import STEPS, save_stand_ins

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]  # 256 images of 384 pixels decoded: a minute or two


def test_the_published_command_runs_unchanged(tmp_path):
    save_stand_ins(tmp_path)
    script = ROOT / "tests" / "recipes" / "published_command.py"
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCH_HOME": str(tmp_path),
        "WANDB_MODE": "offline",
    }
    result = subprocess.run(
        [*LAUNCHER, str(script), *PUBLISHED.split()],
        cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]
    run = tmp_path / "runs" / "train"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    first = lines[0]
    assert (first["ratio"], first["clip_fraction"], first["skipped_steps"]) == (1.0, 0.0, 0.0)
    assert first["reward/lpips_mean"] < 0
    assert first["reward_mean"] == pytest.approx(first["reward/lpips_mean"] + first["reward/reconstruction_mean"])
    assert first["grad_norm"] > 0
    assert first["old_log_prob_gap"] > 0.01  # dropout's: the rollout had none
    assert "the update has dropout, the rollout none" in (run / "log.txt").read_text()

    recipe = tomli.loads((run / "recipe.toml").read_text())
    assert recipe["rollout"]["batch_size"] == 16 * 2
    assert (recipe["training"]["batch_size"], recipe["training"]["micro_batch_size"]) == (8 * 16 * 2, 8)
    assert (recipe["training"]["dropout_mode"], recipe["model"]["class_dropout"]) == ("train", 0.1)
    assert (run / "wandb").is_dir()
    checkpoint = run / "checkpoints" / f"step-{STEPS:06d}"
    trained = torch.load(checkpoint / "consolidated.pth", weights_only=True)["model"]
    before = torch.load(tmp_path / "G", weights_only=True)
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
