"""The reference trainer's command lines mean here what they meant there."""

import json
from pathlib import Path

import pytest

from grpo.config import GRPORecipe, PretrainRecipe, UserError, load_recipe
from grpo.config.flags import REFERENCE_FLAGS
from grpo.config.keys import recipe_keys

SEED_FLAGS = json.loads((Path(__file__).parents[1] / "fixtures" / "seed_flags.json").read_text())
REQUIRED = {"--vq-ckpt": "vq.pth", "--data-path": "images"}

# A value other than the default for every flag; None for a switch.
ACCEPTED = {
    "--gpt-model": ("GPT-XXL", "GPT-XXL"),
    "--gpt-ckpt": ("gpt.pt", "gpt.pt"),
    "--from-fsdp": (None, True),
    "--vq-model": ("VQ-8", "VQ-8"),
    "--vq-ckpt": ("other.pth", "other.pth"),
    "--codebook-size": ("4096", 4096),
    "--codebook-embed-dim": ("16", 16),
    "--image-size": ("384", 384),
    "--downsample-size": ("8", 8),
    "--num-classes": ("10", 10),
    "--mixed-precision": ("fp16", "fp16"),
    "--grad-precision": ("bf16", "bf16"),
    "--data-parallel": ("hsdp", "hsdp"),
    "--lr": ("1e-6", 1e-6),
    "--weight-decay": ("1e-4", 1e-4),
    "--beta1": ("0.8", 0.8),
    "--beta2": ("0.999", 0.999),
    "--max-grad-norm": ("0.5", 0.5),
    "--epochs": ("7", 7),
    "--global-seed": ("3", 3),
    "--num-generations": ("4", 4),
    "--top-k": ("100", 100),
    "--top-p": ("0.9", 0.9),
    "--temperature": ("0.7", 0.7),
    "--sample-batch-size": ("16", 16),
    "--train-batch-size": ("4", 4),
    "--gradient-accumulation-steps": ("2", 2),
    "--num-workers": ("0", 0),
    "--adv-clip-max": ("2", 2.0),
    "--clip-range": ("0.2", 0.2),
    "--dataset": ("folder", "folder"),
    "--data-path": ("elsewhere", "elsewhere"),
    "--use-wandb": (None, True),
    "--wandb-project": ("project", "project"),
    "--wandb-entity": ("team", "team"),
    "--wandb-run-name": ("first", "first"),
    "--log-image-every": ("5", 5),
    "--log-interval": ("1", 1),
    "--ckpt-every": ("2", 2),
    "--ckpt-dir": ("out", "out"),
    "--ckpt-sharded": (None, True),
    "--reward-rec-type": ("l1", "l1"),
    "--reward-rec-weight": ("0.5", 0.5),
    "--reward-use-embedcos": (None, True),
    "--reward-embedcos-weight": ("0.3", 0.3),
    "--aux-ce-weight": ("0.1", 0.1),
    "--kl-coef": ("0.05", 0.05),
    "--use-kl-loss": (None, True),
    "--kl-base-ckpt": ("base.pt", "base.pt"),
    "--use-token-noise": (None, True),
    "--token-noise-prob": ("0.25", 0.25),
    "--use-token-dropout": (None, True),
    "--token-dropout-ratio": ("0.1", 0.1),
}
REFUSED = {
    "--cls-token-num": ("120", "must be 1"),
    "--uncond-prob": ("0.1", "must be 0 in GRPO"),
    "--sample-model-mode": ("train", 'must be "eval" in GRPO'),
    "--reward-perceptual-weight": ("1.0", "not available yet"),
    "--reward-use-gan": (None, "not available yet"),
    "--reward-gan-weight": ("0.5", "not available yet"),
    "--reward-disc-dim": ("32", "not available yet"),
    "--reward-disc-num-layers": ("4", "not available yet"),
    "--reward-disc-ckpt": ("disc.pt", "not available yet"),
}


def command_line(**flags: str | None) -> list[str]:
    """The required flags and these ones; None stands alone."""
    return [word for pair in {**REQUIRED, **flags}.items() for word in pair if word is not None]


def value_of(recipe: GRPORecipe, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def test_flags_and_keys_are_those_of_the_reference() -> None:
    assert {entry["flag"]: entry["key"] for entry in SEED_FLAGS} == dict(REFERENCE_FLAGS)
    assert {**ACCEPTED, **REFUSED}.keys() == REFERENCE_FLAGS.keys()
    documented = {entry["flag"] for entry in SEED_FLAGS[:42]}
    assert documented & REFUSED.keys() == {"--cls-token-num"}  # whose only value for these models is its default


@pytest.mark.parametrize("entry", SEED_FLAGS, ids=lambda entry: entry["flag"])
def test_default_is_that_of_the_reference(entry: dict) -> None:
    recipe = load_recipe(GRPORecipe, command_line())
    expected = REQUIRED[entry["flag"]] if entry["default"] == "required" else entry["default"]
    value = value_of(recipe, entry["key"])
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("flag", ACCEPTED)
def test_flag_sets_its_key(flag: str) -> None:
    text, expected = ACCEPTED[flag]
    recipe = load_recipe(GRPORecipe, command_line(**{flag: text}))
    value = value_of(recipe, REFERENCE_FLAGS[flag])
    assert value == expected
    assert type(value) is type(expected)
    default = next(entry["default"] for entry in SEED_FLAGS if entry["flag"] == flag)
    assert value not in (default, REQUIRED.get(flag))
    if text is not None:
        assert load_recipe(GRPORecipe, [*without(flag), f"{flag}={text}"]) == recipe


def without(flag: str) -> list[str]:
    """The required flags but this one."""
    return [word for name, value in REQUIRED.items() if name != flag for word in (name, value)]


@pytest.mark.parametrize("flag", REFUSED)
def test_flag_without_its_feature_is_refused_by_name(flag: str) -> None:
    text, reason = REFUSED[flag]
    with pytest.raises(UserError) as caught:
        load_recipe(GRPORecipe, command_line(**{flag: text}))
    (line,) = caught.value.problems
    assert line.startswith(f"{flag} {text or 'true'}: {REFERENCE_FLAGS[flag]}")
    assert reason in line


def test_refused_flags_are_accepted_at_their_defaults() -> None:
    defaults = {
        "--cls-token-num": "1",
        "--uncond-prob": "0.0",
        "--sample-model-mode": "eval",
        "--reward-gan-weight": "1",
    }
    recipe = load_recipe(GRPORecipe, command_line(**defaults))
    assert recipe == load_recipe(GRPORecipe, command_line())


def test_command_line_and_recipe_file_agree(tmp_path: Path) -> None:
    (tmp_path / "grpo.toml").write_text(
        '[tokenizer]\ncheckpoint = "vq.pth"\n[data]\npath = "data"\n[rollout]\nbatch_size = 8\nnum_generations = 8\n'
        '[training]\nbatch_size = 4\n[checkpoint]\ninterval = 2\ndir = "out"\n'
    )
    flags = "--vq-ckpt vq.pth --data-path data --sample-batch-size 8 --train-batch-size 4 --num-generations 8"
    by_flags = load_recipe(GRPORecipe, [*flags.split(), "--ckpt-every", "2", "--ckpt-dir", "out"])
    assert load_recipe(GRPORecipe, ["--config", str(tmp_path / "grpo.toml")]) == by_flags


def test_a_flag_and_its_key_together_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(GRPORecipe, [*command_line(), "--lr", "1e-5", "--optimizer.lr=1e-6"])
    assert caught.value.problems == ["--optimizer.lr: optimizer.lr is already set by --lr; give one of them"]


def test_other_jobs_take_keys_only() -> None:
    with pytest.raises(UserError, match="--epochs: unknown flag"):
        load_recipe(PretrainRecipe, ["--data.name", "synthetic", "--epochs", "3"])
    assert "training.steps" in recipe_keys(PretrainRecipe)
