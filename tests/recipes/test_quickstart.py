"""recipes/quickstart.py in miniature: every phase, under torchrun with two processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import tomli_w

from tests import test_documentation as documentation
from tests.recipes.small_quickstarts import write_small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The quickstart's own recipes with small numbers."""
    return write_small("class", tmp_path_factory.mktemp("configs"))


def run(*arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "recipes/quickstart.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def first_run(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    result = run("--configs", configs, "--run-dir", folder, processes=2)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def done(stdout):
    """Phase titles -> whether the phase was done in this run."""
    lines = [line.strip() for line in stdout.splitlines()]
    titles = [(i, match[1]) for i, line in enumerate(lines) if (match := re.fullmatch(r"\[\d+/\d+\] (.*)", line))]
    following = {title: next(line for line in lines[i + 1 :] if re.fullmatch(r"\d+ s|finished before.*", line))
                 for i, title in titles}  # fmt: skip
    return {title: not line.startswith("finished") for title, line in following.items()}


def test_every_phase_runs_on_two_processes_and_ends_in_a_table_and_a_report(first_run):
    folder, stdout = first_run
    assert len(done(stdout)) == 13
    assert all(done(stdout).values())
    rivals = (rf"{name}, guidance 1.\d+, temperature \d.\d" for name in ("base", "more pre-training"))
    for name in ("base", *rivals, "after guidance-free training", "after GRPO"):
        row = next(line for line in stdout.splitlines() if re.match(rf"\W*{name}\s+-?\d", line))
        assert len(re.findall(r"-?\d+\.\d{3}", row)) == 7, row
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 3
    assert not re.search(r"(src|href)=\"(?!data:|#)", page), "the report needs another file"
    assert "after GRPO" in page
    assert "Next:" in stdout


def test_codes_are_restarted_together_on_two_processes(first_run):
    folder, _ = first_run
    lines = [json.loads(line) for line in (folder / "tokenizer" / "metrics.jsonl").read_text().splitlines()]
    moved = [line["codes_restarted"] for line in lines]  # the mean over ranks
    assert moved[-1] > 0
    assert all(count == int(count) for count in moved)


def test_samples_before_and_after_are_measured_on_the_same_scale(first_run):
    folder, _ = first_run
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("evaluate_base", "evaluate_grpo")]
    for metrics in results:
        assert 0 <= metrics["accuracy"] <= 1
        assert 0 < metrics["entropy"] < 3.5  # at most log 32
        assert metrics["fid"] > 0
    assert results[0] != results[1]


def test_results_say_how_each_row_was_drawn(first_run):
    folder, _ = first_run
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["forwards_per_image"] for row in rows] == [1, 2, 1, 2, 1, 1]
    base, rival, more, longer_rival, unguided, after = rows
    for guided in (rival, longer_rival):
        assert guided["cfg_scale"] in (1.25, 1.5, 1.75)
        assert guided["temperature"] in (0.9, 1.0)
    for row in (base, more, unguided, after):
        assert (row["cfg_scale"], row["temperature"], row["seed"]) == (1.0, 1.0, 0)
    assert after["name"] == "after GRPO"
    assert after["fid"] == json.loads((folder / "evaluate_grpo" / "result.json").read_text())["fid"]


def test_second_run_reuses_all_but_what_a_changed_recipe_concerns(first_run, configs, tmp_path):
    folder, _ = first_run
    again = run("--configs", configs, "--run-dir", folder)
    assert again.returncode == 0, again.stderr
    assert not any(done(again.stdout).values())

    changed = tmp_path / "configs"
    shutil.copytree(configs, changed)
    recipe = tomli.loads((changed / "grpo.toml").read_text())
    recipe["optimizer"]["lr"] = 1e-3
    (changed / "grpo.toml").write_text(tomli_w.dumps(recipe))
    before = (folder / "grpo" / "metrics.jsonl").read_text()
    result = run("--configs", changed, "--run-dir", folder)
    assert result.returncode == 0, result.stderr
    assert [title for title, was_done in done(result.stdout).items() if was_done] == [
        "Generator: GRPO",
        "Evaluation: after GRPO",
    ]
    (kept,) = (folder / "previous").glob("grpo-*")
    assert (kept / "metrics.jsonl").read_text() == before


def test_teacher_forced_recipe_shares_the_base_model(first_run, configs):
    folder, _ = first_run
    result = run("--recipe", "vapi", "--configs", configs, "--run-dir", folder)
    assert result.returncode == 0, result.stderr
    assert [title for title, was_done in done(result.stdout).items() if was_done] == [
        "Generator: GRPO",
        "Evaluation: after GRPO",
    ]
    assert (folder / "grpo_vapi" / "model.safetensors").exists()


def test_missing_recipes_are_named_in_one_line(tmp_path):
    result = run("--configs", tmp_path / "nowhere", "--run-dir", tmp_path / "runs")
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "cannot be read" in line]
    assert re.fullmatch(r"--config .*/nowhere/tokenizer.toml: cannot be read: .*", line)
    assert not (tmp_path / "runs").exists()


def test_the_commands_that_follow(first_run, configs, tmp_path, monkeypatch):
    """Those of README and docs/first_run.md after a quickstart, and README's lines of Python."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(first_run[0])
    monkeypatch.chdir(tmp_path)
    for page in ("README.md", "docs/first_run.md"):
        (lines,) = (lines for lines in documentation.blocks(ROOT / page) if lines[0] == documentation.AFTER_QUICKSTART)
        for command in documentation.commands(lines):
            documentation.run(command.replace("--config quickstart/evaluate", f"--config {configs / 'evaluate.toml'}"))
        assert (tmp_path / "digits.png").is_file()
        assert (tmp_path / "compare.html").is_file()
    program = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    names = {}
    exec(program, names)
    assert names["images"].shape == (10, 3, 24, 24)
