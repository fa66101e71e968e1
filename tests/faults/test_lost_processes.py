"""Ranks, data workers and launchers that die or hang; the run goes on and ends as if nothing had happened."""

import pytest

from grpo.observe import read_metrics
from tests.faults.runs import assert_same_run, run, starts

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def test_killed_in_rollout_update_and_save(tmp_path, quiet):
    faults = [
        {"start": 0, "rank": 1, "at": "rollout", "step": 2, "do": "kill"},
        {"start": 1, "rank": 0, "at": "update", "step": 5, "do": "kill", "after": "step-000003"},
        {"start": 2, "rank": 1, "at": "share", "step": 6, "do": "kill"},
        {"start": 3, "rank": 0, "at": "publish", "step": 6, "do": "kill"},
        {"start": 4, "rank": 1, "at": "rollout", "step": 8, "do": "kill_worker", "after": "step-000006"},
    ]
    result = run(tmp_path, faults=faults, restarts=len(faults))
    assert result.returncode == 0, result.stderr
    assert starts(tmp_path) == [0, 0, 3, 3, 3, 6]
    assert "Rank 0 lost another rank in a collective" in result.stderr
    assert "DataLoader worker" in result.stderr
    assert not list((tmp_path / "checkpoints").glob(".step-*"))  # what the killed writers had begun
    assert_same_run(tmp_path, quiet)


def test_a_rank_that_hangs(tmp_path, quiet):
    faults = [{"rank": 1, "at": "rollout", "step": 5, "do": "hang", "after": "step-000003"}]
    result = run(tmp_path, "--parallel.timeout", 10, faults=faults, restarts=1)
    assert result.returncode == 0, result.stderr
    assert starts(tmp_path) == [0, 3]
    assert "did not come within parallel.timeout" in result.stderr
    assert_same_run(tmp_path, quiet)


def test_all_ranks_hang_and_one_is_stopped(tmp_path, quiet):
    """No collective notices the first, and a stopped process answers to no signal but the last one."""
    faults = [{"rank": rank, "at": "rollout", "step": 5, "do": "hang", "after": "step-000003"} for rank in (0, 1)]
    faults += [{"start": 1, "rank": 1, "at": "rollout", "step": 8, "do": "stop", "after": "step-000006"}]
    result = run(tmp_path, "--parallel.timeout", 10, faults=faults, restarts=2)
    assert result.returncode == 0, result.stderr
    assert starts(tmp_path) == [0, 3, 6]
    assert "in step 5, phase rollout, longer than parallel.timeout" in result.stderr
    assert_same_run(tmp_path, quiet)


def test_interrupted(tmp_path, quiet):
    """Ctrl-C reaches the launcher, which passes it on."""
    result = run(tmp_path, faults=[{"at": "rollout", "step": 4, "do": "interrupt_launcher"}])
    assert result.returncode != 0
    assert "stops after this step, with a checkpoint" in result.stderr
    assert "stopped at step 4 (SIG" in (tmp_path / "log.txt").read_text()
    assert run(tmp_path).returncode == 0
    assert starts(tmp_path) == [0, 4]
    assert_same_run(tmp_path, quiet)


def test_terminated_and_without_a_launcher(tmp_path, quiet):
    """SIGTERM to one rank, to torchrun, and torchrun killed: always a checkpoint of the step at hand."""
    faults = [
        {"start": 0, "rank": 1, "at": "rollout", "step": 4, "do": "terminate"},
        {"start": 1, "rank": 0, "at": "rollout", "step": 7, "do": "terminate_launcher"},
    ]
    result = run(tmp_path, faults=faults, restarts=1)
    assert result.returncode == 1  # torchrun's own way to end after SIGTERM
    assert "recipes/train_grpo.py" not in result.stderr  # no traceback of ours
    log = (tmp_path / "log.txt").read_text()
    assert "stopped at step 4 (another rank was asked to)" in log
    assert "stopped at step 7 (SIGTERM)" in log

    result = run(tmp_path, faults=[{"at": "rollout", "step": 10, "do": "kill_launcher"}])
    assert result.returncode == -9
    # The ranks are still there, and stop after their step; the next start waits for them.
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    assert starts(tmp_path) == [0, 4, 7, 10]
    assert "stopped at step 10 (the launcher is gone)" in (tmp_path / "log.txt").read_text()
    assert_same_run(tmp_path, quiet)


def test_a_loss_of_one_rank_that_is_not_a_number_is_skipped_by_all(tmp_path):
    result = run(tmp_path, "--training.steps", 3, faults=[{"rank": 1, "at": "", "step": 2, "do": "not_a_number"}])
    assert result.returncode == 0, result.stderr
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False]
