"""Steps that are not finite are skipped and counted; after too many in a row the run stops with a checkpoint."""

import json
import math
from dataclasses import replace

import pytest
import torch

import grpo.training.run as run_module
from grpo.config import UserError
from grpo.formats import read_tensors
from grpo.jobs import train_grpo
from grpo.rewards import Reward

FLAGS = ["--config", "train_configs/debug.toml", "--metrics.image_interval", "0", "--training.max_skipped_steps", "3"]


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
    whole = run_module.full_state_dict
    monkeypatch.setattr(
        run_module,
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

    def start(spoil, bad_steps):
        original = train_grpo.build

        def build(recipe, run):
            job = original(recipe, run)
            return spoil(job, lambda: job.update.optimizer.steps + 1 in bad_steps)

        monkeypatch.setattr(train_grpo, "build", build)
        flags = ["--checkpoint.interval", "1", "--checkpoint.keep_last", "0", "--metrics.run_dir", str(tmp_path)]
        train_grpo.main([*FLAGS, *flags])

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


@pytest.mark.parametrize("spoil", [loss])
def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(run, tmp_path, spoil):
    with pytest.raises(UserError, match="stopped at step 5: 3 optimizer steps in a row"):
        run(spoil, range(3, 100))
    before, last = (read_tensors(tmp_path / f"checkpoints/step-00000{step}") for step in (2, 5))
    assert all(torch.equal(before[name], last[name]) for name in before)
