"""A dry run says what a recipe would do, and doubts settings that cannot work."""

import os
import re

import pytest
import torch

from grpo.config import GRPORecipe, UserError
from grpo.jobs import memory
from grpo.parallel import World
from grpo.training.dry_run import doubts, dry_run

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def told(**sections):
    base = {"data": {"name": "synthetic", "image_size": 32}, "tokenizer": {"name": "VQ-tiny", "downsample_size": 4}}
    given = {"rollout": {"batch_size": 4, "num_generations": 8}, "objective": {"advantage_clip": 2.0}}
    merged = {key: {**given.get(key, {}), **sections.get(key, {})} for key in {*given, *sections}}
    recipe = GRPORecipe.model_validate({**base, "model": {"name": "GPT-tiny"}, **merged})
    return " ".join(doubts(recipe, ALONE))


SEVERAL = {"batch_size": 8, "mixed_precision": "bf16"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, "objective.clip_range never acts"),
        ({"training": SEVERAL, "objective": {"clip_range": 1e-4}}, "noise decides what is clipped"),
        ({"objective": {"advantage_clip": 2.48}}, "no standardised advantage exceeds 2.47"),
        ({"rollout": {"top_k": 1}}, "rewards have no spread"),
        ({"rollout": {"temperature": 0.01}}, "hardly any spread"),
        ({"rollout": {"num_generations": 2}, "objective": {"advantage_clip": 0.5}}, "noisy baseline"),
        ({"optimizer": {"lr": 0.0}}, "nothing is trained"),
    ],
)
def test_doubts(sections, words):
    assert words in told(**sections)


def test_sound_settings_raise_no_doubt():
    assert told(training=SEVERAL, objective={"clip_range": 0.2}) == ""


def test_nothing_is_started(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dry_run("train", ["--config", "debug"])
    out = capsys.readouterr().out
    assert "dry run of grpo train on 1 CPU process" in out
    assert "16 a step" in out
    assert "memory: about" in out
    assert out.splitlines()[-1].endswith("nothing was started")
    assert not os.listdir(tmp_path)


DIGITS = ["--data.name", "digits", "--data.image_size", "32"]


@pytest.mark.parametrize(
    ("job", "flags", "words"),
    [
        ("reader", [], ["Reader, 35906 parameters", "64 images a step"]),
        ("classifier", [*DIGITS, "--training.batch_size", "16"], ["Classifier, ", "16 images a step"]),
        ("tokenizer", [*DIGITS, "--tokenizer.name", "VQ-tiny", "--tokenizer.downsample_size", "4"], ["VQModel, "]),
        ("train", ["--config", "debug", "--lora.rank", "4"], ["of them trained", "memory: about"]),
    ],
)
def test_every_training_job_has_one(job, flags, words, capsys):
    dry_run(job, flags)
    out = capsys.readouterr().out
    assert all(word in out for word in words), out


SMALL = ["--model.name", "GPT-tiny", "--tokenizer.name", "VQ-tiny", "--tokenizer.downsample_size", "4", *DIGITS]


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("train", ["--training.micro_batch_size", "0"]),
        ("pretrain", ["--activation_checkpoint.mode", "full"]),
        ("distill", ["--training.ema_decay", "0.99"]),
        ("finetune", ["--lora.rank", "4"]),
    ],
)
def test_memory_is_that_of_grpo_memory(job, flags, tmp_path, capsys, monkeypatch):
    (tmp_path / "weights.pt").touch()
    files = [f"--{section}.checkpoint={tmp_path / 'weights.pt'}" for section in ("tokenizer", "model")]
    (tmp_path / "recipe.toml").write_text(f'job = "{job}"\n')
    arguments = ["--config", str(tmp_path / "recipe.toml"), *SMALL, *files, *flags]
    monkeypatch.setattr(memory, "GIB", 2**20)  # its table has two decimals
    monkeypatch.setattr("grpo.parallel.precision.multiplies_bf16", lambda: False)  # a GPU does
    dry_run(job, arguments)
    told = re.search(r"memory: about ([\d.]+) MiB", capsys.readouterr().out)
    memory.main([*arguments, "--gpus", "1", "--memory", str(80 * 1024)])
    peak = re.search(r"^peak +([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert float(told[1]) == pytest.approx(float(peak[1]), rel=5e-3)


@pytest.mark.parametrize("job", ["reader", "classifier"])
def test_sizes_that_do_not_fit_are_told(job):
    with pytest.raises(UserError, match=rf"{job}.width: width 12 must be a multiple of 8"):
        dry_run(job, [*([] if job == "reader" else DIGITS), f"--{job}.width", "12"])


def test_mistakes_are_told_as_by_the_job(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        dry_run("train", ["--config", "debug", "--tokenizer.checkpoint", str(tmp_path / "vq.pt")])
    file = tmp_path / "mine.py"
    file.write_text("def bright(images, radius):\n    return images.mean(dim=(1, 2, 3))\n")
    table = ["--reward.mine.kind", "python", "--reward.mine.function", f"{file}:bright"]
    with pytest.raises(UserError, match=r"reward\.mine: function: .*missing a required argument: 'radius'"):
        dry_run("train", ["--config", "debug", *table])
