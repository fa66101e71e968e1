"""The runs of a sweep: where they go, which are left, how they are started and stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from grpo.config import UserError, load_recipe
from grpo.training.sweep import SweepRun, plan, run_all, slurm_script

DEBUG = ("--config", "debug", "--training.seed", "0,1")


def test_each_run_has_its_own_places(tmp_path):
    places = ("--metrics.run_dir", str(tmp_path / "s"), "--ckpt-dir", "s3://bucket/runs/")
    folder, runs = plan("train", [*DEBUG, *places, "--metrics.wandb"], ranks=None)
    assert folder == tmp_path / "s"
    assert [run.folder for run in runs] == [folder / "seed=0", folder / "seed=1"]
    recipe = load_recipe(type(runs[1].recipe), runs[1].command[1:])
    assert recipe == runs[1].recipe
    assert (recipe.training.seed, recipe.checkpoint.dir) == (1, "s3://bucket/runs/seed=1")
    assert recipe.metrics.wandb_group == "s"


def test_without_a_folder_they_go_beside_that_of_the_recipe():
    folder, runs = plan("train", DEBUG, ranks=None)
    assert str(folder) == "runs/debug-sweep"
    assert runs[0].recipe.checkpoint_dir == "runs/debug-sweep/seed=0/checkpoints"
    assert runs[0].recipe.metrics.wandb_group is None


def test_commands_are_those_of_a_user():
    (alone, _), (many, _) = (plan("train", DEBUG, ranks=ranks)[1] for ranks in (None, 4))
    flags = ["train", "--config", "debug", "--training.seed", "0", "--metrics.run_dir", "runs/debug-sweep/seed=0"]
    assert alone.words == ["grpo", *flags]
    assert alone.process == [sys.executable, "-m", "grpo", *flags]
    assert many.words == ["torchrun", "--standalone", "--nproc_per_node=4", "-m", "grpo", *flags]
    assert many.process[2:6] == ["torch.distributed.run", "--standalone", "--nproc_per_node=4", "-m"]


def test_batches_of_the_reference_count_on_the_ranks_of_each_run():
    _, runs = plan("train", [*DEBUG, "--sample-batch-size", "2"], ranks=4)
    assert runs[0].recipe.rollout.batch_size == 8


def test_mistakes_of_all_recipes_are_told_together():
    flags = ["--data.image_size", "32,33", "--training.sed", "1", "--model.checkpoint", "no.pt"]
    with pytest.raises(UserError) as caught:
        plan("train", ["--config", "debug", *flags], ranks=None)
    told = "\n".join(caught.value.problems)
    assert told.count("--training.sed: unknown flag") == 1
    assert len(caught.value.problems) == len({*caught.value.problems})
    for arguments, words in (
        (["--data.image_size", "32,33"], "image_size=33: "),
        (["--model.checkpoint", "none,no.pt"], "checkpoint=no.pt: --model.checkpoint no.pt: model.checkpoint: "),
    ):
        with pytest.raises(UserError, match=words):
            plan("train", ["--config", "debug", *arguments], ranks=None)


def test_batches_that_the_ranks_cannot_share_are_told_before_anything_starts():
    with pytest.raises(UserError, match=r"^batch_size=12: rollout.batch_size = 12 cannot be shared by 8 ranks"):
        plan("train", ["--config", "debug", "--rollout.batch_size", "8,12"], ranks=8)


def test_one_run_is_no_sweep():
    with pytest.raises(UserError, match=r"nothing differs: .* --training.seed 0,1,2"):
        plan("train", ["--config", "debug"], ranks=None)


@pytest.fixture
def _nothing_is_ignored():
    """A shell without job control starts what runs in its background with SIGINT ignored, which a sweep then keeps."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """runs(program, ...): runs of the debug recipe whose processes are these Python programs instead of training."""

    def make(*programs):
        seeds = ",".join(map(str, range(len(programs))))
        arguments = ["--config", "debug", "--training.seed", seeds, "--metrics.run_dir", str(tmp_path)]
        _, planned = plan("train", arguments, ranks=None)
        commands = {run.name: [sys.executable, "-c", text] for run, text in zip(planned, programs, strict=True)}
        monkeypatch.setattr(SweepRun, "process", property(lambda run: commands[run.name]))
        return planned

    return make


def leave_finished(run):
    """What a finished run leaves in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "recipe.toml").write_text(run.recipe.to_toml())
    (run.folder / "heartbeat.json").write_text(json.dumps({"step": 6, "finished": True}))


def test_a_finished_run_is_passed_over_and_a_failed_one_keeps_no_other_from_starting(runs, capfd):
    planned = runs("raise SystemExit(9)", "raise SystemExit(3)", "print('third')")
    leave_finished(planned[0])
    ends = run_all(planned, say=lambda line: print(line, flush=True))
    assert ends == {"seed=0": "finished before", "seed=1": "failed with exit code 3", "seed=2": "finished"}
    told = capfd.readouterr().out.splitlines()
    assert told[:2] == ["[1/3] seed=0: finished before", "[2/3] seed=1"]
    assert told[2].startswith("[2/3] seed=1: failed with exit code 3; ")
    assert told[3:] == ["[3/3] seed=2", "third"]


@pytest.mark.parametrize(
    ("change", "finished"),
    [({}, True), ({"metrics": {"interval": 3}}, True), ({"training": {"steps": 7}}, False),
     ({"optimizer": {"lr": 1e-7}}, False)],
)  # fmt: skip
def test_a_run_is_finished_if_it_is_the_same_in_all_that_matters(runs, change, finished):
    run = runs("", "")[0]
    leave_finished(run)
    sections = {name: getattr(run.recipe, name).model_copy(update=keys) for name, keys in change.items()}
    assert replace(run, recipe=run.recipe.model_copy(update=sections)).is_finished() is finished


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"step": 3, "ended": "Terminated: 143"}', '{"phase": "update"}']
)
def test_a_run_that_was_stopped_or_runs_is_not_finished(runs, text):
    run = runs("", "")[0]
    leave_finished(run)
    (run.folder / "heartbeat.json").write_text(text)
    assert not run.is_finished()


@pytest.mark.usefixtures("_nothing_is_ignored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_the_run_and_no_other_is_started(runs, tmp_path, capsys, number):
    note, ready = tmp_path / "note", tmp_path / "ready"
    program = (
        "import pathlib, signal, sys, time\n"
        f"def stop(number, _): pathlib.Path({str(note)!r}).write_text(str(number)); sys.exit(143)\n"
        f"signal.signal({int(number)}, stop)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    planned = runs(program, f"import pathlib; pathlib.Path({str(tmp_path / 'second')!r}).touch()")

    def ask():
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run_all(planned, say=print)
    assert signal.getsignal(number) is before
    assert ended.value.code == 128 + number
    assert note.read_text() == str(int(number))
    assert not (tmp_path / "second").exists()
    assert "the same command goes on from there" in capsys.readouterr().out


def test_a_slurm_array_has_a_task_for_each_run(tmp_path):
    """The script as SLURM would run it, with a `srun` that writes down what it is given."""
    _, planned = plan("train", ["--config", "debug", "--training.seed", "0,1"], ranks=None)
    planned = [replace(run, command=[*run.command, "--metrics.wandb_run_name", "a 'b'"], ranks=8) for run in planned]
    text = slurm_script(planned, name="s", made_by=["grpo", "sweep"], then=["grpo", "compare"])
    assert "#SBATCH --array=0-1\n" in text
    assert "#SBATCH --gpus-per-node=8\n" in text
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    for number, run in enumerate(planned):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(number)}
        done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
        assert done.stdout.splitlines() == ["--ntasks=1", *run.words], done.stderr


def test_no_word_of_a_sweep_is_a_line_of_its_script():
    _, planned = plan("train", DEBUG, ranks=None)
    words = ["grpo", "sweep", "a\n#SBATCH --uid=0\ntouch x"]
    text = slurm_script(planned, name="a b\ntouch x", made_by=words, then=words)
    assert not any(line.startswith(("touch", "#SBATCH --uid")) for line in text.splitlines())
    assert "#SBATCH --job-name=a-b-touch-x\n" in text
