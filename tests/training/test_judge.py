"""Evaluation during training: what it measures, of whose weights, on several ranks, resumed, and its alarm."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from grpo.config import EvaluateRecipe, UserError, load_recipe
from grpo.models import (
    GPT,
    MODEL_SPECS,
    TOKENIZER_SPECS,
    Classifier,
    ClassifierConfig,
    VQModel,
    read_weights,
    save_weights,
)
from grpo.parallel import distributed
from grpo.training.judge import RunJudge, alarm_of
from tests.parallel.torchrun import run_two_ranks
from tests.recipes.conftest import read_metrics, run_here  # noqa: F401, a fixture

SIZES = {"image_size": 24, "downsample_size": 4, "vocab_size": 64, "num_classes": 10}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small run on digits with a judge."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    generator = GPT(MODEL_SPECS["GPT-tiny"].config(**SIZES))
    torch.nn.init.normal_(generator.output.weight, std=0.1)
    save_weights(folder / "gpt.safetensors", generator.state_dict(), config=generator.config)
    tokenizer = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=64))
    save_weights(folder / "vq.safetensors", tokenizer.state_dict(), config=tokenizer.config)
    classifier = Classifier(ClassifierConfig(width=8, num_classes=10))
    save_weights(folder / "judge.safetensors", classifier.state_dict(), config=classifier.config)
    models = [
        "--model.name", "GPT-tiny", "--model.num_classes", 10, "--tokenizer.name", "VQ-tiny",
        "--tokenizer.codebook_size", 64, "--tokenizer.downsample_size", 4,
        "--tokenizer.checkpoint", folder / "vq.safetensors",
    ]  # fmt: skip
    run = [
        *models, "--model.checkpoint", folder / "gpt.safetensors", "--data.name", "digits", "--data.image_size", 24,
        "--data.num_workers", 0, "--training.mixed_precision", "fp32", "--metrics.image_interval", 0,
        "--judge.feature_checkpoint", folder / "judge.safetensors", "--judge.split", "validation",
        "--judge.num_images", 45, "--judge.batch_size", 10, "--judge.max_time_share", 1, "--optimizer.lr", 0.01,
    ]  # fmt: skip
    return models, run, folder / "judge.safetensors"


PRETRAIN = ["--judge.interval", 2, "--training.batch_size", 4, "--training.ema_decay", 0.5, "--checkpoint.interval", 1]
JUDGED = ("judge/fid", "judge/accuracy")


def judged(lines):
    return {line["step"]: [line[name] for name in JUDGED] for line in lines if "judge/fid" in line}


def test_judges_the_average_as_the_evaluation_does_and_resumes(run_here, small, tmp_path):  # noqa: F811
    from grpo.jobs.evaluate import evaluate

    models, flags, classifier = small
    flags = [*flags, *PRETRAIN]
    whole = run_here("pretrain", *flags, "--training.steps", 5, "--metrics.run_dir", tmp_path / "whole")
    assert list(judged(whole)) == [2, 4, 5]
    assert all(0 < line["judge/time_share"] <= 1 for line in whole if "judge/fid" in line)
    broken = [*flags, "--metrics.run_dir", tmp_path / "broken"]
    run_here("pretrain", *broken, "--training.steps", 3)
    resumed = run_here("pretrain", *broken, "--training.steps", 5)
    assert {step: judged(resumed)[step] for step in (2, 4, 5)} == judged(whole)  # besides the first part's last step
    records = json.loads((tmp_path / "broken" / "judge.json").read_text())
    assert [record["step"] for record in records] == [0, 2, 3, 4, 5]
    assert [record["fid"] for record in records if record["step"] in (2, 4, 5)] == [
        line["judge/fid"] for line in whole if "judge/fid" in line
    ]
    with Image.open(tmp_path / "broken" / "samples" / "evolution.png") as picture:
        assert picture.height > 5 * 24

    results = []
    for name in ("model", "model_ema"):
        settings = [
            *models, "--model.checkpoint", tmp_path / "whole" / f"{name}.safetensors", "--data.name", "digits",
            "--data.split", "validation", "--data.image_size", 24, "--sampling.image_size", 24, "--sampling.seed", 1,
            "--sampling.mixed_precision", "fp32", "--evaluation.feature_checkpoint", classifier,
            "--evaluation.num_images", 45, "--evaluation.json_path", tmp_path / f"{name}.json",
        ]  # fmt: skip
        with distributed(60) as world:
            evaluate(load_recipe(EvaluateRecipe, [str(flag) for flag in settings]), world)
        metrics = json.loads((tmp_path / f"{name}.json").read_text())["metrics"]["classifier"]
        results.append([metrics["fid"], metrics["accuracy"]])
    assert results[1] == pytest.approx(judged(whole)[5], rel=1e-5)
    assert results[0] != pytest.approx(judged(whole)[5], rel=1e-5)


def test_two_ranks_and_the_best_checkpoint(run_here, small, tmp_path):  # noqa: F811
    """Five batches on two ranks: one draws three, one two; the same numbers. The best checkpoint is the judge's."""
    _, flags, _ = small
    flags = [*flags, "--judge.interval", 1, "--training.batch_size", 4, "--training.steps", 2]
    flags += ["--training.micro_batch_size", 2]
    best = ["--checkpoint.interval", 1, "--checkpoint.keep_last", 1, "--checkpoint.keep_best", 1]
    best += ["--checkpoint.best_metric", "judge/fid", "--checkpoint.best_is", "lowest"]
    one = run_here("pretrain", *flags, *best, "--metrics.run_dir", tmp_path / "one")
    kept = sorted(path.name for path in (tmp_path / "one" / "checkpoints").iterdir())
    fids = [line["judge/fid"] for line in one]
    assert f"step 2: judge/fid {fids[1]:.4g}, " in (tmp_path / "one" / "log.txt").read_text()
    assert kept == sorted({"step-000001" if fids[0] < fids[1] else "step-000002", "step-000002"})
    result = run_two_ranks("-m", "grpo", "pretrain", *map(str, flags), "--metrics.run_dir", str(tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    for step, values in judged(read_metrics(tmp_path / "two")).items():
        assert values == pytest.approx(judged(one)[step], rel=1e-3)


@pytest.mark.parametrize(("count", "side", "problem"), [
    (12, 16, "16x16 pixels and those that are drawn 24x24"), (1, 24, "two reference images at least"),
])  # fmt: skip
def test_reference_that_cannot_be_compared_is_refused(run_here, small, tmp_path, count, side, problem):  # noqa: F811
    _, flags, _ = small
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((count, side, side, 3), np.uint8))
    index = flags.index("--judge.split")
    flags = [*flags[:index], "--judge.reference", tmp_path / "reference.npz", *flags[index + 2 :]]
    with pytest.raises(UserError, match=problem):
        run_here("pretrain", *flags, *PRETRAIN, "--training.steps", 1, "--metrics.run_dir", tmp_path / "run")


def record(step, fid, reward):
    return {"step": step, "fid": fid, "reward": reward, "seconds": 1.0}


def test_alarm_when_the_reward_rises_and_the_judge_falls():
    start = {"step": 0, "fid": 0.1, "seconds": 1.0}  # before the first step there is no reward
    rising = [start, record(10, 2.0, 0.1), record(20, 1.0, 0.2), record(30, 1.5, 0.3), record(40, 1.2, 0.4)]
    assert [alarm_of(rising[: count + 1], 2) is not None for count in range(5)] == [False] * 4 + [True]
    assert "step 20 for 2 evaluations (1 -> 1.2)" in alarm_of(rising, 2)
    assert alarm_of([*rising, record(50, 3.0, 0.5)], 2) is None  # told every second time
    assert alarm_of([*rising, record(50, 3.0, 0.5), record(60, 3.0, 0.5)], 2) is not None
    assert alarm_of([*rising[:-1], record(40, 1.2, 0.1)], 2) is None  # the reward falls too
    assert alarm_of([*rising, record(50, 0.9, 0.5)], 1) is None  # a new best
    assert alarm_of([], 1) is None
    assert alarm_of([start, record(10, 1.0, 0.1)], 1) is None  # one evaluation


def test_an_fid_that_is_no_number_is_worse_than_any():
    nan = float("nan")
    assert alarm_of([record(10, nan, 0.1), record(20, 2.0, 0.2)], 1) is None  # the second one is the best
    assert "(2 -> nan)" in alarm_of([record(10, nan, 0.1), record(20, 2.0, 0.2), record(30, nan, 0.3)], 1)
    assert alarm_of([record(10, nan, 0.1), record(20, nan, 0.2)], 1) is None


def test_a_judge_that_sees_no_numbers(run_here, small, tmp_path):  # noqa: F811
    """judge.json stays JSON, the run goes on where it was ended, and no checkpoint is the best."""
    _, flags, judge = small
    weights = {name: values * 1e30 if "conv" in name else values for name, values in read_weights(judge).items()}
    save_weights(tmp_path / "wild.safetensors", weights, config=ClassifierConfig(width=8, num_classes=10))
    index = flags.index("--judge.feature_checkpoint")
    flags = [*flags[: index + 1], tmp_path / "wild.safetensors", *flags[index + 2 :], "--training.batch_size", 4]
    flags += [
        "--judge.interval",
        1,
        "--checkpoint.interval",
        1,
        "--checkpoint.keep_last",
        1,
        "--checkpoint.keep_best",
        1,
    ]
    flags += ["--checkpoint.best_metric", "judge/fid", "--checkpoint.best_is", "lowest", "--metrics.run_dir", tmp_path]
    run_here("pretrain", *flags, "--training.steps", 1)
    lines = run_here("pretrain", *flags, "--training.steps", 2)
    assert [line["judge/fid"] for line in lines] == [None, None]
    text = (tmp_path / "judge.json").read_text()
    assert [record["fid"] for record in json.loads(text, parse_constant=pytest.fail)] == [None] * 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_the_best_checkpoint_goes_by_its_newest_evaluation(run_here, small, tmp_path, monkeypatch):  # noqa: F811
    """Of FIDs 9, 1 and 3, 4 in two checkpoints the first has the better last one, the second the better mean."""
    _, flags, _ = small
    fids = iter([5.0, 9.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr("grpo.training.judge.frechet_distance", lambda *_: next(fids))
    flags = [
        *flags,
        "--judge.interval",
        1,
        "--training.batch_size",
        4,
        "--training.steps",
        4,
        "--checkpoint.interval",
        2,
    ]
    flags += ["--checkpoint.keep_last", 1, "--checkpoint.keep_best", 1, "--checkpoint.best_metric", "judge/fid"]
    run_here("pretrain", *flags, "--checkpoint.best_is", "lowest", "--metrics.run_dir", tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_a_reward_that_is_no_number_is_left_out():
    judge = RunJudge.__new__(RunJudge)
    judge._reward_sum, judge._reward_steps, judge._run_seconds = 0.0, 0, 0.0
    for reward in (1.0, float("nan"), 3.0):
        judge.note(reward, 1.0)
    assert (judge._reward_sum, judge._reward_steps, judge._run_seconds) == (4.0, 2, 3.0)


def test_reward_beside_the_judge_and_the_stop(run_here, small, tmp_path, monkeypatch):  # noqa: F811
    """What is recorded of a GRPO run; an alarm tells, or stops the run with a checkpoint."""
    _, flags, _ = small
    flags = [
        *flags,
        "--judge.interval",
        2,
        "--training.steps",
        4,
        "--rollout.batch_size",
        2,
        "--rollout.num_generations",
        2,
    ]
    lines = run_here("train", *flags, "--metrics.run_dir", tmp_path / "whole")
    records = json.loads((tmp_path / "whole" / "judge.json").read_text())
    rewards = [line["reward_mean"] for line in lines]
    assert [record.get("reward") for record in records] == [None, sum(rewards[:2]) / 2, sum(rewards[2:]) / 2]

    monkeypatch.setattr(
        "grpo.training.judge.alarm_of", lambda records, patience: "deceived" if len(records) > 1 else None
    )
    with pytest.raises(UserError, match="stopped at step 2: deceived"):
        run_here("train", *flags, "--judge.stop", "true", "--metrics.run_dir", tmp_path / "stopped")
    assert (tmp_path / "stopped" / "checkpoints" / "step-000002").is_dir()
    assert len(run_here("train", *flags, "--metrics.run_dir", tmp_path / "told")) == 4
    assert "step 2: deceived" in (tmp_path / "told" / "log.txt").read_text()


@pytest.mark.parametrize("change", [
    {"records": [{"fid": 1.0, "seconds": 1.0}]}, {"records": [{"step": 1, "fid": 1.0}]}, {"records": [{"step": 1}]},
    {"records": [{"step": 10**400, "fid": 1.0, "seconds": 1.0}]}, {"records": [{"step": 1, "fid": None}]},
    {"records": [[1]]}, {"run_seconds": "3"}, {"reward_sum": None}, {"reward_steps": True}, {"reward_steps": 10**400},
], ids=str)  # fmt: skip
def test_other_things_than_a_judges_state_are_refused(change):
    judge = RunJudge.__new__(RunJudge)
    state = {"records": [{"step": 1, "fid": float("nan"), "seconds": 1.0, "accuracy": 0.5}], "run_seconds": 2.0}
    state |= {"reward_sum": 1.0, "reward_steps": 1}
    judge.load_state_dict(state)
    assert judge.records == state["records"]
    with pytest.raises((TypeError, ValueError)):  # what a resumed run tells in one line
        judge.load_state_dict(state | change)
    assert judge.records == state["records"]


def test_evaluations_take_no_more_than_their_share_of_the_time(run_here, small, tmp_path):  # noqa: F811
    _, flags, _ = small
    index = flags.index("--judge.max_time_share")
    flags = [*flags[: index + 1], 1e-6, *flags[index + 2 :], "--judge.interval", 1, "--training.batch_size", 4]
    lines = run_here("pretrain", *flags, "--training.steps", 3, "--metrics.run_dir", tmp_path)
    assert list(judged(lines)) == [3]  # the last
