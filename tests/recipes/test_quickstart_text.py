"""`grpo quickstart --recipe text` in miniature: every phase on two processes, the table, and a prompt of one's own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.shapes import ATTRIBUTES
from tests.recipes.small_quickstarts import write_small

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "grpo", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "220"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Configs with small numbers, the run's folder, and what the run printed."""
    folder = tmp_path_factory.mktemp("text")
    write_small("text", folder / "configs")
    flags = ["--recipe", "text", "--configs", folder / "configs", "--run-dir", folder / "run"]
    return folder, run("quickstart", *flags, processes=2)


def test_every_phase_runs_and_the_table_has_seen_and_unseen_combinations(finished):
    folder, stdout = finished
    assert stdout.count("] ") >= 9
    rows = json.loads((folder / "run" / "results.json").read_text())["rows"]
    one_forward = rows[:1] + rows[2:]
    assert [row["forwards_per_image"] for row in one_forward] == [1, 1, 1]
    assert [row["name"] for row in one_forward] == ["base", "after guidance-free training", "after GRPO"]
    assert re.fullmatch(r"base, guidance \d.\d, temperature \d.\d", rows[1]["name"])
    for row in rows:
        named = [f"{part}/{name}" for part in ("seen", "unseen") for name in (*ATTRIBUTES, "all", "position")]
        assert all(0 <= row[name] <= 1 for name in (*named, *(f"fit/{name}" for name in named)))
        assert row["accuracy"] == row["unseen/all"]
        assert row["fid"] > 0
    for phase in ("evaluate_base", "evaluate_guided", "evaluate_gft", "evaluate_grpo"):
        assert (folder / "run" / phase / "samples.png").stat().st_size > 10_000
    assert "after GRPO" in (folder / "run" / "report.html").read_text()


def test_a_prompt_of_ones_own(finished):
    folder, _ = finished
    weights = {"model": "grpo", "tokenizer": "tokenizer"}
    flags = [
        text
        for section, phase in weights.items()
        for text in (f"--{section}.checkpoint", folder / "run" / phase / "model.safetensors")
    ]
    grid = folder / "ring.png"
    asked = ["--sampling.prompt", "a red ring above a blue cross", "--output.num_images", 4, "--output.grid", grid]
    run("generate", "--config", folder / "configs" / "generate.toml", *flags, *asked)
    assert grid.exists()


def test_evaluate_tells_both_readers(finished):
    folder, _ = finished
    flags = [
        text
        for key, phase in (("model", "pretrain"), ("tokenizer", "tokenizer"))
        for text in (f"--{key}.checkpoint", folder / "run" / phase / "model.safetensors")
    ]
    reader = ["--evaluation.reader_checkpoint", folder / "run" / "reader" / "model.safetensors"]
    path = folder / "result.json"
    run("evaluate", "--config", folder / "configs" / "evaluate.toml", *flags, *reader, "--evaluation.json_path", path)
    metrics = json.loads(path.read_text())["metrics"]
    base = json.loads((folder / "run" / "evaluate_base" / "result.json").read_text())
    assert metrics["reader"]["unseen/all"] == base["unseen/all"]
    assert metrics["fit"]["seen/shape"] == pytest.approx(base["fit/seen/shape"])
    assert metrics["reader"]["fid"] == pytest.approx(base["fid"], rel=1e-3)
