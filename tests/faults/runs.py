"""Start disturbed runs and read what they leave behind."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.formats import read_tensors
from grpo.observe import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
NAMES = ("step", "loss", "grad_norm", "reward_mean", "reward_std", "entropy", "kl")


def run(
    folder: Path, *flags: object, faults: Sequence[dict[str, Any]] = (), ranks: int = 2, restarts: int = 0
) -> subprocess.CompletedProcess:
    """Run the debugging recipe in `folder` with a plan of faults, and wait for its end."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"trace": str(folder), "faults": list(faults)}))
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        f"--max-restarts={restarts}",
    ]
    settings = {"metrics.run_dir": folder, "training.steps": STEPS, "checkpoint.interval": 3, "data.num_workers": 1,
                "metrics.image_interval": 0, "objective.kl": "k3", "parallel.timeout": 60,
                "checkpoint.keep_last": 0, "rollout.batch_size": 8, "training.batch_size": 32}  # fmt: skip
    settings |= zip((str(flag).removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True)
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), "tests/faults/disturbed_recipe.py", str(plan),
         "--config", "train_configs/debug.toml", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip


def starts(folder: Path) -> list[int]:
    """The step from which each start of the run went on; what was lost before the first checkpoint lies aside."""
    aside = sorted((folder / "previous").glob("*/log.txt"), key=lambda path: int(path.parent.name))
    text = "".join(path.read_text() for path in (*aside, folder / "log.txt"))
    return [int(step) for step in re.findall(r": from step (\d+) to", text)]


def curve(folder: Path) -> list[list[str]]:
    """The metrics of every step, as the bits of their numbers."""
    return [[float(line[name]).hex() for name in NAMES] for line in read_metrics(folder / "metrics.jsonl")]


def drawn(folder: Path) -> dict[int, list[list[Any]]]:
    """Of each sample, [place in the data set, fingerprint of its tokens] as often as it was drawn."""
    found: dict[int, list[list[Any]]] = {}
    for path in folder.glob("rank-*.jsonl"):
        for line in path.read_text().splitlines():
            for sample, what in json.loads(line)["drawn"].items():
                found.setdefault(int(sample), []).append(what)
    return found


def state(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    return read_tensors(folder / "checkpoints" / f"step-{step:06d}")


def assert_same_run(folder: Path, quiet: Path) -> None:
    """Losses, gradient norms, rewards, data order, drawn tokens, weights and optimizer state: the same bits."""
    assert curve(folder) == curve(quiet)
    once = {sample: found[0] for sample, found in drawn(quiet).items()}
    again = drawn(folder)
    assert again.keys() == once.keys()
    assert all(found == once[sample] for sample in again for found in again[sample])  # also what was done twice
    first, second = state(folder), state(quiet)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
