"""Runs with rewards that need more than one batch: populations, statistics of all ranks, frozen generators."""

import pytest
import torch

from grpo.config import UserError
from grpo.jobs import train_grpo
from grpo.jobs.train_grpo import main
from grpo.models import Classifier, ClassifierConfig, save_weights

DEBUG = ["--config", "train_configs/debug.toml", "--metrics.image_interval", "0"]


@pytest.fixture
def population(tmp_path):
    """Flags of a leave-one-out FID with a memory, and of rewards normalised in other ways."""
    torch.manual_seed(0)
    path = tmp_path / "classifier.safetensors"
    save_weights(path, Classifier(ClassifierConfig(width=8)).state_dict())
    function = tmp_path / "mine.py"
    function.write_text(
        "def shy(images, tokens):\n"
        "    return images.mean(dim=(1, 2, 3)).masked_fill(tokens[:, 0] % 3 == 0, float('nan'))\n"
    )
    fid = {"checkpoint": path, "net": "classifier", "memory": 0.9, "reference_images": 40}
    fid |= {"separate": "true", "weight": 2.0}
    shy = {"kind": "python", "function": f"{function}:shy", "normalise": "batch"}
    tables = {
        "loo_fid": fid,
        "shy": shy,
        "log_ratio": {"normalise": "group", "weight": 0.5},
        "reconstruction": {"weight": 1},
    }
    return [
        text
        for name, keys in tables.items()
        for key, value in keys.items()
        for text in (f"--reward.{name}.{key}", str(value))
    ]


NAMES = (
    "loss",
    "grad_norm",
    "surrogate",
    "zero_spread",
    "kl",
    "reward_mean",
    "reward/loo_fid_mean",
    "reward/loo_fid_std",
)
NAMES += ("reward/log_ratio_mean", "reward/shy_abstained")


def test_two_ranks_reward_what_one_does(run_here, run_on_two, population, tmp_path):
    common = [*DEBUG, *population, "--training.steps", 3, "--objective.kl", "k3"]
    common += ["--checkpoint.save_final", "false", "--checkpoint.interval", 0]
    one = run_here("train", *common, "--metrics.run_dir", tmp_path / "one")
    two = run_on_two("train", *common, "--metrics.run_dir", tmp_path / "two")
    for first, second in zip(one, two, strict=True):
        for name in NAMES:
            assert second[name] == pytest.approx(first[name], rel=2e-4, abs=1e-6), name
    assert 0 < one[0]["reward/shy_abstained"] < 1
    assert one[0]["reward/loo_fid_std"] > 0
    assert one[0]["seconds/reward"] > one[0]["seconds/reward/loo_fid"] > 0


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_resumed_memory_goes_on_bit_for_bit(run_here, population, tmp_path, covariance):
    common = [*DEBUG, *population, "--reward.loo_fid.covariance", covariance, "--checkpoint.interval", 2]
    whole = run_here("train", *common, "--training.steps", 4, "--metrics.run_dir", tmp_path / "whole")
    broken = [*common, "--metrics.run_dir", tmp_path / "broken"]
    run_here("train", *broken, "--training.steps", 2)
    resumed = run_here("train", *broken, "--training.steps", 4)
    names = [name for name in NAMES if name != "kl"]
    assert [[line[name] for name in names] for line in resumed] == [[line[name] for name in names] for line in whole]


@pytest.mark.parametrize(("other", "built"), [([], 2), (["--reward.log_ratio.checkpoint", "other"], 3)])
def test_a_frozen_generator_is_shared_with_the_kl_term(run_here, tmp_path, monkeypatch, other, built):
    asked, build = [], train_grpo.build_generator
    if other:  # it has to be there, and is not read here
        (tmp_path / "other.pt").touch()
        other = [other[0], tmp_path / "other.pt"]

    def recorded(*arguments, checkpoint, **keywords):
        asked.append(checkpoint)
        return build(*arguments, checkpoint=None, **keywords)

    for place in ("grpo.jobs.train_grpo", "grpo.training.build"):
        monkeypatch.setattr(f"{place}.build_generator", recorded)
    flags = [*DEBUG, *other, "--reward.log_ratio.weight", 1, "--objective.kl", "k3", "--training.steps", 1]
    run_here("train", *flags, "--metrics.run_dir", tmp_path, "--checkpoint.save_final", "false")
    assert len(asked) == built


def test_a_function_without_any_opinion_stops_the_run_with_a_checkpoint(tmp_path):
    function = tmp_path / "mine.py"
    function.write_text("import math\n\n\ndef silent(images):\n    return [math.nan] * len(images)\n")
    flags = ["--reward.it.kind", "python", "--reward.it.function", f"{function}:silent", "--training.steps", "12"]
    flags += ["--metrics.run_dir", str(tmp_path / "run"), "--checkpoint.interval", "0"]
    told = r"stopped at step 10: reward\.it: .*mine\.py:4: no opinion \(NaN\) of 100% of .* 10 steps in a row"
    with pytest.raises(UserError, match=told):
        main([*DEBUG, *flags])
    assert (tmp_path / "run/checkpoints/step-000010").is_dir()
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("mine.py:4: no opinion (NaN) of 100% of the completions of a step; the run stops after 10") == 1


def test_a_scorer_that_is_down_stops_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    flags = ["--reward.judge.kind", "http", "--reward.judge.url", "http://127.0.0.1:9/", "--reward.judge.retries", "0"]
    flags += ["--reward.reconstruction.weight", "1", "--metrics.run_dir", str(tmp_path), "--checkpoint.interval", "0"]
    with pytest.raises(UserError, match=r"stopped at step 3: reward\.judge: http://127\.0\.0\.1:9/: no opinion"):
        main([*DEBUG, *flags])
    assert (tmp_path / "checkpoints/step-000003").is_dir()


def test_all_missing_files_are_told_at_once(tmp_path):
    flags = {
        "model.checkpoint": "gpt.pt",
        "tokenizer.checkpoint": "vq.pt",
        "data.name": "folder",
        "data.path": "images",
        "objective.kl": "k3",
        "objective.reference_checkpoint": "reference.pt",
        "reward.loo_fid.checkpoint": "inception.pth",
        "reward.loo_fid.reference": "stats.npz",
        "reward.mine.kind": "python",
        "reward.mine.function": "mine.py:f",
        "reward.off.kind": "class_log_prob",
        "reward.off.checkpoint": "off.pt",
        "reward.off.weight": "0",
        "optimizer.lr": "-1",
    }
    with pytest.raises(UserError) as error:
        main(
            [*DEBUG, "--metrics.run_dir", str(tmp_path / "run"), *(w for k, v in flags.items() for w in (f"--{k}", v))]
        )
    lines = error.value.problems
    missing = ["gpt.pt", "vq.pt", "images", "reference.pt", "inception.pth", "stats.npz"]
    for name in missing:
        (line,) = (line for line in lines if f": {name} does not exist; wanted: " in line)
        assert f" {name}: " in line  # behind the flag that names it
    assert any("reward.mine: function: cannot read" in line for line in lines)
    assert any("optimizer.lr" in line for line in lines)
    assert len(lines) == len(missing) + 2
    assert not (tmp_path / "run").exists()
