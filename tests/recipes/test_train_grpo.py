"""recipes/train_grpo.py as a user runs it: one and two processes, resumed, with the reference trainer's flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from grpo.config import UserError
from grpo.jobs.train_grpo import main
from grpo.models import (
    GPT,
    MODEL_SPECS,
    TOKENIZER_SPECS,
    Classifier,
    ClassifierConfig,
    VQModel,
    save_weights,
)

ROOT = Path(__file__).resolve().parents[2]
DEBUG = ["--config", "train_configs/debug.toml", "--metrics.image_interval", "0"]


def run(*arguments, processes=1, check=True, **variables):
    """Run the recipe; several processes are started by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "recipes/train_grpo.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def values(folder, *names):
    return [[line[name] for name in names] for line in metrics(folder)]


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*DEBUG, "--metrics.run_dir", whole)
    run(*DEBUG, "--metrics.run_dir", broken, "--training.steps", 3)
    run(*DEBUG, "--metrics.run_dir", broken)
    names = ("step", "loss", "grad_norm", "reward_mean", "surrogate", "entropy")
    assert len(metrics(whole)) == 6
    assert [list(map(float.hex, map(float, line))) for line in values(broken, *names)] == [
        list(map(float.hex, map(float, line))) for line in values(whole, *names)
    ]
    weights = [(folder / "checkpoints/step-000006/consolidated.pth").read_bytes() for folder in (whole, broken)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    save_weights(path, Classifier(ClassifierConfig(width=8)).state_dict())
    return path


def test_two_processes_compute_what_one_does(tmp_path, classifier):
    """The same images in the same order, the same completions, the same losses, with half the batch each."""
    one, two = tmp_path / "one", tmp_path / "two"
    common = [*DEBUG, "--training.steps", 2, "--checkpoint.save_final", "false", "--checkpoint.interval", 0]
    common += ["--rollout.mode", "autoregressive", "--reward.class_log_prob.checkpoint", classifier]
    common += ["--objective.kl", "k3", "--rollout.cfg_scale", 1.5, "--training.micro_batch_size", 4]
    run(*common, "--metrics.run_dir", one)
    run(*common, "--metrics.run_dir", two, processes=2)
    for first, second in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "reward_mean", "reward_std", "grad_norm", "kl", "ratio", "aux_ce", "entropy"):
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-7), name


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What a user of the reference trainer has: two weight files in LlamaGen's layout and a saved data set."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "downsample_size": 4, "vocab_size": 256, "num_classes": 10}
    torch.save({"model": GPT(MODEL_SPECS["GPT-tiny"].config(**sizes)).state_dict()}, folder / "gpt.pt")
    tokenizer = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=256))
    torch.save({"model": tokenizer.state_dict()}, folder / "vq.pth")
    pixels = torch.randint(256, (40, 40, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(image.numpy()) for image in pixels]
    rows = Dataset.from_dict({"image": images, "label": [i % 10 for i in range(40)]})
    DatasetDict({"train": rows}).save_to_disk(folder / "data")
    return folder


def test_reference_command_line_equals_the_recipe(tmp_path, published):
    flags = (
        f"--gpt-model GPT-tiny --gpt-ckpt {published}/gpt.pt --vq-model VQ-tiny --vq-ckpt {published}/vq.pth "
        "--codebook-size 256 --image-size 32 --downsample-size 4 --num-classes 10 --mixed-precision fp32 "
        f"--data-path {published}/data --num-workers 1 --epochs 2 --sample-batch-size 8 --train-batch-size 4 "
        f"--num-generations 8 --ckpt-every 2 --ckpt-dir {tmp_path}/out --log-interval 1 --log-image-every 2 --lr 1e-3"
    )
    run(*flags.split(), "--metrics.run_dir", tmp_path / "flags", processes=2)
    assert (tmp_path / "out/step-000002/resume_step.txt").read_text().strip() == "2"
    assert (tmp_path / "out/step-000002/state_type.txt").read_text().strip() == "full"
    assert set(torch.load(tmp_path / "out/step-000002/consolidated.pth", weights_only=True)) == {"model"}
    assert (tmp_path / "flags/samples/step-000002.png").exists()

    recipe = (tmp_path / "flags/recipe.toml").read_text()
    (tmp_path / "again.toml").write_text(recipe.replace(f"{tmp_path}/out", f"{tmp_path}/out2"))
    run("--config", tmp_path / "again.toml", "--metrics.run_dir", tmp_path / "toml", processes=2)
    names = ("step", "loss", "grad_norm", "reward_mean")
    assert values(tmp_path / "toml", *names) == values(tmp_path / "flags", *names)


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (["--vq-ckpt", "missing.pth"], "missing.pth"),
        (["--gpt-ckpt", "{published}/vq.pth"], "VQ tokenizer"),
        (["--data-path", "nowhere"], "nowhere"),
        (["--num-classes", "9"], "label"),
        (["--codebook-size", "128"], "tokenizer.codebook_size"),
        (["--image-size", "34"], "data.image_size"),
        (["--downsample-size", "8"], "tokenizer.downsample_size"),
        (["--train-batch-size", "5"], "training.batch_size"),
        (["--lrr", "1"], "--lr"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, published, mistake, line):
    arguments = (
        f"--gpt-model GPT-tiny --gpt-ckpt {published}/gpt.pt --vq-model VQ-tiny --vq-ckpt {published}/vq.pth "
        f"--codebook-size 256 --image-size 32 --downsample-size 4 --num-classes 10 --data-path {published}/data "
        f"--num-workers 0 --sample-batch-size 8 --train-batch-size 8"
    ).split()
    for flag, value in zip(mistake[::2], mistake[1::2], strict=True):
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value.format(published=published)
        else:
            arguments += [flag, value]
    with pytest.raises(UserError) as error:
        main([*arguments, "--metrics.run_dir", str(tmp_path / "run")])
    assert len(error.value.problems) == 1
    assert line in error.value.problems[0]
    assert "\n" not in error.value.problems[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_ends_the_program_with_its_line_only(processes):
    result = run("--config", "train_configs/debug.toml", "--gpt-ckpt", "missing.pth", check=False, processes=processes)
    assert result.returncode == (2 if processes == 1 else 1)  # torchrun's own code is 1
    lines = [line for line in result.stderr.splitlines() if "missing.pth" in line]
    assert len(lines) == 1
    assert 'recipes/train_grpo.py", line' not in result.stderr  # torchrun has a traceback of its own, we have none
    if processes == 1:
        assert result.stderr.splitlines() == lines


def test_a_run_that_has_diverged_stops_with_a_checkpoint(tmp_path):
    arguments = [
        *DEBUG,
        "--objective.aux_ce_weight",
        "1e32",
        "--training.max_skipped_steps",
        "2",
        "--checkpoint.interval",
        "0",
    ]
    with pytest.raises(UserError, match="2 optimizer steps in a row") as error:
        main([*arguments, "--metrics.run_dir", str(tmp_path)])
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert f"stopped at step {int(checkpoint.name[-6:])}:" in str(error.value)
    assert [line["grad_norm"] for line in metrics(tmp_path)][-2:] == [None, None]


def test_triton_kernels_give_the_training_curve_of_the_reference(tmp_path):
    """The whole recipe on Triton's interpreter (or on the GPU): the same tokens, the same losses within rounding."""
    common = [*DEBUG, "--training.steps", 3, "--checkpoint.save_final", "false", "--checkpoint.interval", 0]
    common += ["--rollout.batch_size", 1, "--rollout.num_generations", 2, "--training.batch_size", 2]
    common += ["--rollout.top_k", 50, "--objective.kl", "k3"]
    for kernels in ("reference", "triton"):
        run(*common, "--training.kernels", kernels, "--metrics.run_dir", tmp_path / kernels, TRITON_INTERPRET="1")
    for ours, reference in zip(metrics(tmp_path / "triton"), metrics(tmp_path / "reference"), strict=True):
        assert ours["reward_mean"] == reference["reward_mean"]  # the same completions
        for name in ("loss", "grad_norm", "kl", "entropy", "aux_ce", "kept_mass"):
            assert ours[name] == pytest.approx(reference[name], rel=1e-5, abs=1e-7), name


def test_shipped_recipe_without_images_in_miniature(tmp_path, classifier, published, run_here, run_on_two):
    """Classes alone: one process, two, and one that goes on where it stopped compute the same."""
    flags = ["--config", "c2i_classes_only", "--gpt-model", "GPT-tiny", "--gpt-ckpt", published / "gpt.pt"]
    flags += ["--vq-model", "VQ-tiny", "--vq-ckpt", published / "vq.pth", "--codebook-size", 256]
    flags += ["--image-size", 32, "--downsample-size", 4, "--num-classes", 10, "--mixed-precision", "fp32"]
    flags += ["--reward.class_log_prob.checkpoint", classifier, "--checkpoint.interval", 0, "--optimizer.lr", 1e-3]
    flags += ["--rollout.batch_size", 12, "--rollout.num_generations", 2, "--training.batch_size", 24]
    flags += ["--metrics.image_interval", 2, "--data.classes", "3,5,7,8"]
    one = run_here("train", *flags, "--training.steps", 3, "--metrics.run_dir", tmp_path / "one")
    assert (tmp_path / "one/samples/step-000002.png").is_file()
    broken = [*flags, "--metrics.run_dir", tmp_path / "broken"]
    run_here("train", *broken, "--training.steps", 1)
    names = ("loss", "reward_mean", "grad_norm", "kl", "entropy")
    resumed = run_here("train", *broken, "--training.steps", 3)
    assert [[line[name] for name in names] for line in resumed] == [[line[name] for name in names] for line in one]
    two = run_on_two("train", *flags, "--training.steps", 3, "--metrics.run_dir", tmp_path / "two")
    for first, second in zip(one, two, strict=True):
        assert [second[name] for name in names] == pytest.approx([first[name] for name in names], rel=1e-4, abs=1e-7)
        assert "aux_ce" not in first


def test_a_function_that_wants_real_images_is_told_that_there_are_none(tmp_path, published):
    (tmp_path / "mine.py").write_text(
        "def likeness(images, real_images):\n    return -(images - real_images).mean((1, 2, 3))"
    )
    flags = f"--config c2i_classes_only --gpt-model GPT-tiny --gpt-ckpt {published}/gpt.pt --vq-model VQ-tiny "
    flags += f"--vq-ckpt {published}/vq.pth --codebook-size 256 --image-size 32 --downsample-size 4 --num-classes 10 "
    flags += f"--reward.class_log_prob.weight 0 --reward.mine.kind python --metrics.run_dir {tmp_path}/run "
    flags += f"--reward.class_log_prob.checkpoint none.pth --reward.mine.function {tmp_path}/mine.py:likeness"
    with pytest.raises(UserError, match="real_images: the data set has none"):
        main(flags.split())
