"""What a run goes on from: damaged checkpoints, restarts by torchrun, other recipes, other writers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo.config import UserError
from grpo.jobs.train_grpo import main
from grpo.training.run import Terminated

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--config", "train_configs/debug.toml", "--metrics.image_interval", "0"]


def run(folder, *flags):
    keep = [] if "--checkpoint.keep_last" in flags else ["--checkpoint.keep_last", "0"]
    main([*FLAGS, "--metrics.run_dir", str(folder), *keep, *map(str, flags)])
    return curve(folder)


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], float(line["loss"]).hex(), float(line["grad_norm"]).hex()) for line in lines]


def starts(folder):
    log = (folder / "log.txt").read_text()
    return [int(line.split("from step ")[1].split()[0]) for line in log.splitlines() if "from step" in line]


@pytest.fixture(scope="module")
def nine_steps(tmp_path_factory):
    """The curve of nine steps in one go."""
    return run(tmp_path_factory.mktemp("whole"), "--training.steps", 9)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, nine_steps):
    run(tmp_path)
    shard = tmp_path / "checkpoints/step-000006/shard-00001-model-00001-of-00001.safetensors"
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 3] ^= 4
    shard.write_bytes(contents)
    assert run(tmp_path, "--training.steps", 9) == nine_steps
    assert starts(tmp_path) == [0, 3]
    log = (tmp_path / "log.txt").read_text()
    assert f"step-000006 is damaged: {shard.name} changed since it was written; renamed to step-000006.damaged" in log
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-000003", "step-000006", "step-000009", "step-000006.damaged"}


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path):
    run(tmp_path / "first", "--training.steps", 3)
    named = tmp_path / "first/checkpoints/step-000003"
    (named / "run_state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint\.resume: .*step-000003 is incomplete: run_state\.json missing"):
        run(tmp_path / "second", "--checkpoint.resume", named)
    with pytest.raises(UserError, match="not a whole checkpoint of a run"):
        run(tmp_path / "second", "--checkpoint.resume", tmp_path / "nowhere")


def test_after_a_restart_the_run_goes_on_from_its_own_checkpoints(tmp_path, monkeypatch, nine_steps):
    """torchrun repeats the command line of the first start, whatever checkpoint.resume was in it."""
    run(tmp_path, "--checkpoint.resume", "none")
    with pytest.raises(UserError, match=r"checkpoint\.resume = none"):
        run(tmp_path, "--checkpoint.resume", "none", "--training.steps", 9)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(tmp_path, "--checkpoint.resume", "none", "--training.steps", 9) == nine_steps
    assert starts(tmp_path) == [0, 6]

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    branch, named = tmp_path / "branch", tmp_path / "checkpoints/step-000003"
    run(branch, "--checkpoint.resume", named, "--optimizer.lr", "1e-4")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    run(branch, "--checkpoint.resume", named, "--optimizer.lr", "1e-4", "--training.steps", 9)
    assert starts(branch) == [3, 6]
    assert [line[0] for line in curve(branch)] == list(range(4, 10))
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", "--checkpoint.resume", named, "--training.steps", 4)  # killed before it saved anything
    assert starts(tmp_path / "empty") == [3]


def test_a_recipe_that_differs_is_refused_with_the_differences(tmp_path):
    run(tmp_path, "--training.steps", 3)
    with pytest.raises(UserError) as error:
        run(tmp_path, "--optimizer.lr", "1e-4", "--objective.clip_range", "0.1", "--metrics.interval", "7")
    assert "differ (2 keys)" in error.value.problems[0]
    assert [line.split()[0] for line in error.value.problems[1:]] == ["objective.clip_range:", "optimizer.lr:"]
    assert starts(tmp_path) == [0]


@pytest.mark.parametrize("state", [{}, {"step": 3}, {"step": "x", "recipe": 1, "run_dir": "", "stream": 0}, []])
def test_a_state_that_is_not_a_runs_is_refused(tmp_path, state):
    from grpo.formats import FileSum, file_sums, manifest_text, read_manifest

    run(tmp_path, "--training.steps", 3)
    folder = tmp_path / "checkpoints/step-000003"
    file = folder / "run_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "run": state}))
    sums: dict[str, FileSum] = {**read_manifest(folder), **file_sums([file])}
    (folder / "manifest.json").write_text(manifest_text(sums))
    with pytest.raises(UserError, match=r"run_state\.json is not that of a training run"):
        run(tmp_path)


def test_sigterm_ends_the_run_with_a_checkpoint(tmp_path, nine_steps):
    """Here sent to this very process, as a cluster does to a run without torchrun."""

    def send_when_it_runs():
        while not (tmp_path / "metrics.jsonl").exists() or not curve(tmp_path):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=send_when_it_runs)
    thread.start()
    with pytest.raises(Terminated) as end:
        run(tmp_path, "--training.steps", 1000, "--checkpoint.interval", 0)
    thread.join()
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    last = curve(tmp_path)[-1][0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{last:06d}"]
    assert f"stopped at step {last} (SIGTERM)" in (tmp_path / "log.txt").read_text()
    run(tmp_path, "--training.steps", last + 2)
    assert starts(tmp_path) == [0, last]
    assert curve(tmp_path)[:9] == nine_steps[: last + 2]


def test_two_runs_do_not_write_one_folder(tmp_path, caplog):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from grpo.training.run_lock import lock_folder; "
         f"lock = lock_folder(Path({str(tmp_path)!r}), wait_seconds=0); print('held', flush=True); sys.stdin.read()"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is being written by another run \(process {holder.pid} on"):
        run(tmp_path, "--parallel.timeout", 1)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert "waiting up to 0 s for its end" in caplog.text
    holder.kill()
    holder.wait()
    run(tmp_path, "--training.steps", 1)


def test_keep_best_by_a_metric_of_the_run(tmp_path):
    flags = ["--checkpoint.interval", 1, "--checkpoint.keep_last", 1, "--checkpoint.keep_best", 1]
    run(tmp_path, *flags, "--checkpoint.best_metric", "grad_norm", "--checkpoint.best_is", "lowest")
    norms = [json.loads(line)["grad_norm"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = {int(path.name[-6:]) for path in (tmp_path / "checkpoints").iterdir()}
    best = norms.index(min(norms)) + 1
    assert kept == {6, best}
    told = f"its best checkpoint: {tmp_path}/checkpoints/step-{best:06d}, grad_norm {min(norms):.4g}\n"
    assert told in (tmp_path / "log.txt").read_text()
    with pytest.raises(UserError, match=r"best_metric: this job has no metric 'reward'; it has .*reward_mean"):
        run(tmp_path / "other", *flags, "--checkpoint.best_metric", "reward")


def test_a_reward_file_that_changed_is_a_difference_that_naming_the_checkpoint_accepts(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(images):\n    return images.mean(dim=(1, 2, 3))\n")
    flags = ["--reward.mine.kind", "python", "--reward.mine.function", f"{file}:mine"]
    run(tmp_path / "run", *flags, "--training.steps", 3)
    file.write_text(file.read_text() + "# a word more\n")
    with pytest.raises(UserError, match=r"differ \(1 keys\)") as error:
        run(tmp_path / "run", *flags, "--training.steps", 4)
    assert error.value.problems[1].startswith("reward.mine.sha256: ")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    run(tmp_path / "run", *flags, "--training.steps", 4, "--checkpoint.resume", checkpoint)
    assert starts(tmp_path / "run") == [0, 3]


def resumed_at(folder, *flags):
    """The step that a run of one more step starts from."""
    run(folder, "--checkpoint.interval", 1, *flags)
    return starts(folder)[-1]


def test_every_way_to_start_again(tmp_path, monkeypatch):
    """All cells of the table in `find_checkpoint`, on runs that take one step at a time."""
    other, folder = tmp_path / "other", tmp_path / "run"
    step, own = (f"{run_dir}/checkpoints/step-{{:06d}}".format for run_dir in (other, folder))
    run(other, "--checkpoint.interval", 1, "--training.steps", 2)

    def start(resume, steps):
        return resumed_at(folder, "--checkpoint.resume", resume, "--training.steps", steps)

    def refused(resume, match):
        before = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match=match):
            start(resume, 9)
        assert (folder / "metrics.jsonl").read_bytes() == before

    assert start(f"{step(1)}/", 2) == 1  # another run's, with a slash that means nothing
    assert start(step(1), 3) == 2  # the same command by hand: on from what it has written
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "abc")
    assert start(f"{step(1)}//", 4) == 3
    assert start("auto", 5) == 4
    assert start(step(1), 6) == 5  # auto has kept where the run began
    refused(step(2), "already holds step-000006, which did not go on from it")
    refused(own(3), "already holds step-000006, which did not go on from it")
    assert start(own(6), 7) == 6  # its own newest
    assert start(own(6), 8) == 7  # and again
    refused(step(1), "did not go on from it")  # the run now began elsewhere
    refused("none", "already holds checkpoints")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued
    assert start("none", 9) == 8
    assert [line[0] for line in curve(folder)] == list(range(2, 10))


def test_a_falling_rate_does_not_jump_back(tmp_path):
    """With more steps the cosine of a finished run would begin anew at a high rate."""
    cosine = ["--optimizer.schedule", "cosine"]
    run(tmp_path, *cosine, "--training.steps", 3)
    with pytest.raises(UserError, match="recipe, data or files differ") as error:
        run(tmp_path, *cosine, "--training.steps", 6)
    assert error.value.problems[1].startswith("training.steps: 3 -> 6, and with it the learning rate")
    run(tmp_path, *cosine, "--training.steps", 6, "--checkpoint.resume", tmp_path / "checkpoints/step-000003")
    assert starts(tmp_path) == [0, 3]


def test_the_last_checkpoint_comes_before_the_weights_in_one_file(tmp_path):
    """So that a full disk, or here a folder in the way, costs the export alone."""
    (tmp_path / ".model.safetensors.unfinished").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors could not be written"):
        run(tmp_path, "--training.steps", 3)
    assert (tmp_path / "checkpoints/step-000003/manifest.json").exists()
    run(tmp_path, "--training.steps", 3)
    assert starts(tmp_path) == [0, 3]
    assert (tmp_path / "model.safetensors").exists()


def test_weights_of_the_users_in_the_runs_folder_are_moved_aside(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    run(tmp_path, "--training.steps", 1)
    assert (tmp_path / "previous/1/model.safetensors").read_text() == "mine"
