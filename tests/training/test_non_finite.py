"""Steps that are not finite are skipped and counted; after too many in a row the run stops with a checkpoint."""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grpo.training.export as export_module
from grpo.config import UserError
from grpo.formats import read_tensors
from grpo.jobs import train_grpo
from grpo.rewards import Reward

FLAGS = ["--config", "train_configs/debug.toml", "--metrics.image_interval", "0"]
MOST = ["--training.max_skipped_steps", "3"]


def reward_mean(job, bad):
    """A reward that is not a number for the first completion of each batch."""

    class Spoilt(Reward):
        def __init__(self, reward):
            self.reward = reward

        def __call__(self, batch):
            values = self.reward(batch)
            return values.index_fill(0, torch.tensor([0]), torch.nan) if bad() else values

    terms = {name: term._replace(reward=Spoilt(term.reward)) for name, term in job.reward.terms.items()}
    return job._replace(reward=replace(job.reward, terms=terms))


def loss(job, bad):
    """An infinite loss whose gradient is finite."""
    part_of_loss = job.update._loss
    job.update._loss = lambda *given: part_of_loss(*given) + (torch.inf if bad() else 0)
    return job


def grad_norm(job, bad):
    """A gradient that is not a number, of a finite loss."""
    job.policy.output.weight.register_hook(lambda gradient: gradient * torch.nan if bad() else gradient)
    return job


def test_weights_that_are_not_finite_are_not_exported(monkeypatch, tmp_path):
    """But the checkpoint before is there, to look at."""
    whole = export_module.full_state_dict
    monkeypatch.setattr(
        export_module,
        "full_state_dict",
        lambda model: {name: tensor * torch.nan for name, tensor in whole(model).items()},
    )
    flags = ["--training.steps", "1", "--metrics.run_dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"model\.safetensors is not written: .* holds NaN"):
        train_grpo.main([*FLAGS, *flags])
    assert (tmp_path / "checkpoints/step-000001/manifest.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run")
@pytest.mark.parametrize("flag", ["--training.kernels"])
def test_kernels_that_do_not_run_here(flag, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r'training\.kernels = "triton": .* not on a GPU; set it to "auto"'):
        train_grpo.main([*FLAGS, flag, "triton", "--metrics.run_dir", str(tmp_path)])


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(spoil, bad_steps): the debugging recipe with those steps spoilt; its lines of metrics and its log."""

    def start(spoil, bad_steps, *more):
        original = train_grpo.build

        def build(recipe, run):
            job = original(recipe, run)
            return spoil(job, lambda: job.update.optimizer.steps + 1 in bad_steps)

        monkeypatch.setattr(train_grpo, "build", build)
        flags = ["--checkpoint.interval", "1", "--checkpoint.keep_last", "0", "--metrics.run_dir", str(tmp_path)]
        train_grpo.main([*FLAGS, *(more or MOST), *flags])

    return start


@pytest.mark.parametrize("spoil", [reward_mean, loss, grad_norm])
def test_a_spoilt_step_changes_nothing_and_is_told(run, tmp_path, spoil):
    run(spoil, {3, 5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2, 2]
    spoilt = [line[spoil.__name__] is None for line in lines]
    assert spoilt == [False, False, True, False, True, False]
    log = (tmp_path / "log.txt").read_text()
    assert f"step 3: {spoil.__name__} is not finite, the optimizer step was skipped (1 so far, 1 in a row)" in log
    states = [read_tensors(tmp_path / f"checkpoints/step-00000{step}") for step in range(1, 7)]
    for step, spoilt_here in enumerate(spoilt[1:], 1):
        same = all(torch.equal(states[step][name], states[step - 1][name]) for name in states[0])
        assert same == spoilt_here
    assert all(math.isfinite(float(tensor.sum())) for state in states for tensor in state.values())


def test_a_run_that_took_no_step_has_failed(run, tmp_path):
    told = r"stopped at step 6: nothing was learned: all 6 optimizer steps .*\(reward\.\w+\)\. Its checkpoint is in"
    with pytest.raises(UserError, match=told):
        run(reward_mean, range(100), "--training.max_skipped_steps", "9")
    assert (tmp_path / "checkpoints/step-000006").is_dir()
    assert not (tmp_path / "model.safetensors").exists()
    assert re.search(
        r"step 2: reward_mean is not finite.* in a row\): reward\.\w+$", (tmp_path / "log.txt").read_text(), re.M
    )


CODE = {
    "silent": "return [float('nan')] * len(images)",
    "wanders": "import os; os.chdir('/'); return images.mean((1, 2, 3))",
}


@pytest.mark.parametrize(("what", "told"), [("silent", "had no opinion"), ("wanders", None)])
def test_runs_with_a_function(monkeypatch, tmp_path, what, told):
    """One that never has an opinion has failed when it ends; one that goes elsewhere finds its folder."""
    (tmp_path / "mine.py").write_text(f"def f(images):\n    {CODE[what]}\n")
    config = Path("train_configs/debug.toml").absolute()
    monkeypatch.chdir(tmp_path)
    flags = ["--reward.mine.kind", "python", "--reward.mine.function", "mine.py:f", "--metrics.run_dir", "run"]
    flags = ["--config", str(config), "--training.steps", "2", *flags]
    with pytest.raises(UserError, match=rf"at step 2: reward\.mine: .*mine\.py:1: {told}") if told else nullcontext():
        train_grpo.main(flags)
    assert (tmp_path / "run/checkpoints/step-000002").is_dir()
    assert (tmp_path / "run/model.safetensors").exists() == (told is None)


@pytest.mark.parametrize("spoil", [loss])
def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(run, tmp_path, spoil):
    with pytest.raises(UserError, match="stopped at step 5: 3 optimizer steps in a row"):
        run(spoil, range(3, 100))
    before, last = (read_tensors(tmp_path / f"checkpoints/step-00000{step}") for step in (2, 5))
    assert all(torch.equal(before[name], last[name]) for name in before)
