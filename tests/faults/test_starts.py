"""Whole runs that are started again: from object storage, by a queue, by hand, on other numbers of ranks."""

import shutil

import pytest

from grpo.observe import read_metrics
from tests.faults.runs import assert_same_run, run, starts

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def test_killed_while_a_checkpoint_goes_to_a_store(tmp_path, quiet):
    folder = tmp_path / "run"
    fault = {"rank": 1, "at": "share", "step": 6, "do": "kill"}
    result = run(folder, "--checkpoint.dir", f"file://{tmp_path}/store", faults=[fault], restarts=1)
    assert result.returncode == 0, result.stderr
    assert starts(folder) == [0, 3]
    assert f"resumed from file://{tmp_path}/store/step-000003" in (folder / "log.txt").read_text()
    assert not any((folder / ".stage").glob("*"))
    shutil.copytree(tmp_path / "store", folder / "checkpoints")
    assert_same_run(folder, quiet)


def test_by_hand_by_a_queue_and_on_other_numbers_of_ranks(tmp_path, monkeypatch):
    def start(steps, ranks):
        return run(tmp_path, "--checkpoint.resume", "none", "--training.steps", steps, ranks=ranks)

    def refused(told, ranks):
        before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "log.txt").read_bytes()
        result = start(9, ranks)
        assert result.returncode != 0
        assert sum(told in line for line in result.stderr.splitlines()) == 1, result.stderr
        assert 'disturbed_recipe.py", line' not in result.stderr  # no traceback of ours
        assert ((tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "log.txt").read_bytes()) == before

    assert start(3, ranks=2).returncode == 0
    refused("checkpoint.resume = none: ", ranks=2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refused("rollout.batch_size", ranks=3)  # eight images are no three equal shares
    assert start(6, ranks=1).returncode == 0
    assert start(9, ranks=4).returncode == 0
    assert starts(tmp_path) == [0, 3, 6]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))
