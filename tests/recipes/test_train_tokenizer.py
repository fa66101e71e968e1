"""recipes/train_tokenizer.py on small images."""

import pytest
import torch

from grpo.config import UserError
from grpo.models import load_vq, read_weights
from tests.vgg import save_vgg16

TINY = [
    "--data.name", "digits", "--data.image_size", "32", "--data.num_workers", "0",
    "--tokenizer.name", "VQ-tiny", "--tokenizer.codebook_size", "32", "--tokenizer.downsample_size", "4",
    "--training.mixed_precision", "fp32", "--optimizer.lr", "2e-3", "--metrics.image_interval", "0",
]  # fmt: skip
NAMES = ("loss", "reconstruction", "commitment", "grad_norm", "perplexity")


def values(lines):
    return [pytest.approx([line[name] for name in NAMES], rel=1e-4, abs=1e-6) for line in lines]


def plain(lines):
    return [[line[name] for name in NAMES] for line in lines]


def test_reconstruction_improves_and_the_tokenizer_loads_by_the_name_that_does_not_change(run_here, tmp_path):
    flags = ["--training.steps", 30, "--training.batch_size", 16, "--tokenizer_loss.unquantised_steps", 10]
    lines = run_here("tokenizer", *TINY, *flags, "--metrics.run_dir", tmp_path / "run")
    assert lines[-1]["reconstruction"] < 0.4 * lines[0]["reconstruction"]
    assert lines[-1]["perplexity"] > 4
    tokenizer = load_vq(tmp_path / "run" / "model.safetensors")
    assert tokenizer.config.codebook_size == 32
    assert tokenizer.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run_here, tmp_path):
    """Across the step that sets the codebook, with codes restarted on both sides of the interruption."""
    flags = [*TINY, "--training.batch_size", 8, "--tokenizer_loss.unquantised_steps", 1]
    flags += ["--tokenizer_loss.restart_threshold", 4, "--tokenizer_loss.codebook_ema", 0.1]
    whole = run_here("tokenizer", *flags, "--training.steps", 5, "--metrics.run_dir", tmp_path / "whole")
    broken = [*flags, "--metrics.run_dir", tmp_path / "broken"]
    run_here("tokenizer", *broken, "--training.steps", 3)
    resumed = run_here("tokenizer", *broken, "--training.steps", 5)
    assert all(line["codes_restarted"] > 0 for line in whole[2:])
    assert plain(resumed) == plain(whole)
    weights = [read_weights(tmp_path / name / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_accumulation_does_not_change_the_steps(run_here, tmp_path, update):
    flags = [*TINY, "--training.steps", 3, "--tokenizer_loss.codebook_update", update]
    flags += ["--tokenizer_loss.unquantised_steps", 0, "--tokenizer_loss.restart_threshold", 0]
    flags += ["--checkpoint.save_final", "false"]
    once = run_here("tokenizer", *flags, "--training.batch_size", 8, "--metrics.run_dir", tmp_path / "once")
    parts = ["--training.batch_size", 8, "--training.micro_batch_size", 4]
    twice = run_here("tokenizer", *flags, *parts, "--metrics.run_dir", tmp_path / "twice")
    assert plain(twice) == values(once)


def test_two_processes_take_the_steps_of_one(run_here, run_on_two, tmp_path):
    """Same losses, gradients and codebook: its statistics are those of all ranks."""
    flags = [*TINY, "--training.steps", 3, "--tokenizer_loss.unquantised_steps", 0]
    flags += ["--tokenizer_loss.restart_threshold", 0]
    one = run_here("tokenizer", *flags, "--training.batch_size", 8, "--metrics.run_dir", tmp_path / "one")
    two = run_on_two("tokenizer", *flags, "--training.batch_size", 8, "--metrics.run_dir", tmp_path / "two")
    assert plain(two) == values(one)
    codes = [
        read_weights(tmp_path / name / "model.safetensors")["quantize.embedding.weight"] for name in ("one", "two")
    ]
    torch.testing.assert_close(*codes)


def test_factor_of_another_tokenizer_is_refused(run_here, tmp_path):
    flags = [*TINY, "--metrics.run_dir", tmp_path / "run"]
    flags[flags.index("--tokenizer.downsample_size") + 1] = "8"
    with pytest.raises(UserError, match=r"tokenizer.downsample_size: VQ-tiny has 4 pixels a code, not 8"):
        run_here("tokenizer", *flags)
    assert not (tmp_path / "run").exists()


ADVERSARY = [
    *TINY, "--adversary.weight", 0.5, "--adversary.start", 2, "--adversary.dim", 4, "--adversary.num_layers", 2,
    "--adversary.adaptive", "--tokenizer_loss.unquantised_steps", 0, "--training.batch_size", 4,
]  # fmt: skip
"""A discriminator that joins at the second step."""


def test_learned_losses_are_resumed_bit_for_bit_and_the_discriminator_rewards(run_here, tmp_path):
    """Interrupted once before the discriminator starts and once after; then it and LPIPS reward a run."""
    backbone = save_vgg16(tmp_path / "vgg.pth")
    learned = ["--tokenizer_loss.perceptual_weight", 0.5, "--tokenizer_loss.perceptual_backbone", backbone]
    learned = [*ADVERSARY, *learned]
    whole = run_here("tokenizer", *learned, "--training.steps", 4, "--metrics.run_dir", tmp_path / "whole")
    for steps in (1, 3, 4):
        flags = ["--training.steps", steps, "--metrics.run_dir", tmp_path / "broken"]
        resumed = run_here("tokenizer", *learned, *flags)
    judged = ("adversarial", "adversarial_weight", "discriminator_loss", "logits_real", "discriminator_grad_norm")
    assert "adversarial" not in whole[0]
    assert all(line["perceptual"] > 0 for line in whole)
    assert plain(resumed) == plain(whole)
    assert [[line.get(name) for name in judged] for line in resumed] == [
        [line.get(name) for name in judged] for line in whole
    ]
    for name in ("model.safetensors", "discriminator.safetensors"):
        first, second = (read_weights(tmp_path / run / name) for run in ("whole", "broken"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["main.3.running_var"], torch.ones(8))

    flags = [*TINY[:12], "--model.name", "GPT-tiny", "--model.num_classes", 10, "--training.mixed_precision", "fp32"]
    flags += ["--tokenizer.checkpoint", tmp_path / "whole" / "model.safetensors", "--rollout.batch_size", 2]
    flags += [
        "--rollout.num_generations",
        2,
        "--training.batch_size",
        4,
        "--training.steps",
        1,
        "--metrics.run_dir",
        tmp_path / "grpo",
    ]
    flags += ["--reward-perceptual-weight", 1, "--reward.lpips.backbone", backbone]
    flags += ["--reward-use-gan", "--reward-disc-ckpt", tmp_path / "whole" / "discriminator.safetensors"]
    (line,) = run_here("train", *flags)
    assert line["reward/lpips_mean"] < 0
    assert line["reward/patchgan_std"] > 0
    parts = sum(line[f"reward/{name}_mean"] for name in ("reconstruction", "lpips", "patchgan"))
    assert line["reward_mean"] == pytest.approx(parts, rel=1e-5)


def test_the_discriminator_is_the_same_on_both_ranks(run_on_two, tmp_path):
    """A resumed run gives every rank what rank 0 had; it would differ if another rank had had something else."""
    flags = [*ADVERSARY, "--training.steps", 4, "--checkpoint.interval", 3]
    whole = run_on_two("tokenizer", *flags, "--metrics.run_dir", tmp_path / "whole")
    flags += ["--checkpoint.resume", tmp_path / "whole" / "checkpoints" / "step-000003"]
    (resumed,) = run_on_two("tokenizer", *flags, "--metrics.run_dir", tmp_path / "resumed")
    assert resumed["discriminator_loss"] == whole[3]["discriminator_loss"]
    assert plain([resumed]) == plain(whole[3:])
    first, second = (read_weights(tmp_path / run / "discriminator.safetensors") for run in ("whole", "resumed"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_missing_backbone_is_told_before_training(run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    told = r"LPIPS needs torchvision's VGG16, vgg16-397923af.pth: no file .*`tokenizer_loss.perceptual_backbone`"
    with pytest.raises(UserError, match=told):
        run_here("tokenizer", *TINY, "--tokenizer_loss.perceptual_weight", 1, "--metrics.run_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
