"""`grpo sweep`: the command from beginning to end, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import pytest

from grpo.config import UserError
from grpo.jobs import compare, sweep

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
COMMANDS = "".join(re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)).splitlines()
FLAGS = ("train", "--config", "debug", "--training.seed", "0,1", "--metrics.run_dir", "s")


def test_the_commands_of_the_page(tmp_path, monkeypatch, capfd):
    """One after the other; what would be written by the shell's `>` is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    commands = [shlex.split(line.partition(" > ")[0]) for line in COMMANDS if line.startswith("grpo ")]
    told = []
    for _, job, *words in commands:
        {"sweep": sweep, "compare": compare}[job].main(words)
        told.append(capfd.readouterr().out)
    first, page, several, lists, script = told
    assert "[2/2] seed=1" in first
    assert f"once more: {shlex.join(commands[1])}" in first
    assert "written to runs/debug-sweep/compare.html" in page
    assert "seed=1" in Path("runs/debug-sweep/compare.html").read_text()
    for seed in (0, 1):
        lines = Path(f"runs/debug-sweep/seed={seed}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    ends = [line.rpartition("/")[2] for line in several.splitlines()]
    assert (len(ends), ends[0], ends[-1]) == (6, "lr=1e-05,seed=0", "lr=3e-05,seed=2")
    assert [line.rpartition("/")[2] for line in lists.splitlines()] == ["targets=wqkv", "targets=wqkv+wo"]
    assert "#SBATCH --array=0-0\n" in script, "two of the three runs are finished"
    sweep.main(commands[0][2:])
    assert capfd.readouterr().out.count("finished before") == 2


def test_the_exit_code_tells_that_runs_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "run_all", lambda runs, say: {"seed=0": "finished", "seed=1": "failed with exit code 2"})
    with pytest.raises(SystemExit) as ended:
        sweep.main(FLAGS)
    told = capsys.readouterr()
    assert ended.value.code == 1
    assert "1 of 2 runs failed: seed=1" in told.err
    assert "fewer than two runs have metrics" in told.out


def test_commands_are_printed_and_nothing_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep.main(["--config", "quickstart/tokenizer", "--optimizer.lr", "1e-5,3e-5", "--print"])  # the job of the file
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["grpo", "tokenizer"]] * 2
    assert lines[1].endswith("--optimizer.lr 3e-5 --metrics.run_dir runs/quickstart/tokenizer-sweep/lr=3e-05")
    sweep.main(["train", "--config", "debug", "--training.seed", "0,1,2", "--nproc", "4", "--slurm"])
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2" in script
    assert "#   grpo sweep train --config debug --training.seed 0,1,2 --nproc 4 --slurm > sweep.sh" in script
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--config", "debug"], "evaluate: no job that trains; there are train, pretrain"),
        ([], "takes a job and its flags"),
        (["trian"], "did you mean train?"),
        (["train", "--nproc", "0"], "--nproc 0 must be at least 1"),
        (["train", "--nproc", "x"], "--nproc"),
        (["train", "--config", "debug"], "nothing differs"),
        (["--config", "quickstart/evaluate", "--sampling.seed", "1,2"], "evaluate: no job that trains"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        sweep.main(arguments)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_under_a_launcher_it_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--nproc N instead of torchrun"):
        sweep.main(["train", "--training.seed", "0,1"])
