"""The reference trainer's command lines mean here what they meant there."""

import json
from pathlib import Path

import pytest

from grpo.config import GRPORecipe, PretrainRecipe, UserError, differences, load_recipe
from grpo.config.keys import section_keys
from grpo.config.reference_flags import ALL_FLAGS, BATCH_FLAGS, REFERENCE_FLAGS

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
    "--uncond-prob": ("0.3", 0.3),
    "--sample-model-mode": ("twice", "twice"),
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
    "--reward-disc-dim": ("32", 32),
    "--reward-disc-num-layers": ("4", 4),
    "--reward-disc-ckpt": ("disc.pt", "disc.pt"),
    "--aux-ce-weight": ("0.1", 0.1),
    "--kl-coef": ("0.05", 0.05),
    "--use-kl-loss": (None, True),
    "--kl-base-ckpt": ("base.pt", "base.pt"),
    "--use-token-noise": (None, True),
    "--token-noise-prob": ("0.25", 0.25),
    "--use-token-dropout": (None, True),
    "--token-dropout-ratio": ("0.1", 0.1),
}
ONE_CHOICE = {"--cls-token-num"}  # whose other values are for texts
TRANSLATED = {
    "--sample-batch-size",
    "--train-batch-size",
    "--gradient-accumulation-steps",
    "--reward-use-embedcos",
    "--reward-embedcos-weight",
    "--reward-perceptual-weight",
    "--reward-use-gan",
    "--reward-gan-weight",
}
OFF = {"lpips", "patchgan"}
"""Rewards that a command line without their flags has no table of."""
PUBLISHED = (
    "--vq-ckpt V --data-path D --gpt-ckpt G --from-fsdp --image-size 384 --downsample-size 16 --gpt-model GPT-XXL "
    "--sample-batch-size 16 --train-batch-size 8 --gradient-accumulation-steps 16 --num-generations 8 "
    "--temperature 1.0 --top-k 0 --top-p 1.0 --epochs 100 --ckpt-every 100 --lr 1e-6 --weight-decay 1e-4 --beta1 0.9 "
    "--beta2 0.999 --max-grad-norm 1.0 --clip-range 0.2 --adv-clip-max 5.0 --mixed-precision bf16 --data-parallel fsdp "
    "--reward-rec-weight 1.0 --reward-perceptual-weight 1.0 --aux-ce-weight 0.1 --sample-model-mode train --use-wandb "
    "--wandb-project autoreg-grpo --wandb-entity none --wandb-run-name c2i-grpo"
)
"""The published command on 8 GPUs."""


def command_line(**flags: str | None) -> list[str]:
    """The required flags and these ones; None stands alone."""
    return [word for pair in {**REQUIRED, **flags}.items() for word in pair if word is not None]


def value_of(recipe: GRPORecipe, key: str) -> object:
    section, *table, name = key.split(".")
    part = getattr(recipe, section)
    return getattr(part.tables[table[0]] if table else part, name)


def test_flags_are_those_of_the_reference() -> None:
    assert {entry["flag"] for entry in SEED_FLAGS} == {*ACCEPTED, *ONE_CHOICE, *TRANSLATED}
    assert ALL_FLAGS.keys() == {*ACCEPTED, *ONE_CHOICE, *TRANSLATED, *TEXT_ONLY}
    moved = {entry["flag"] for entry in SEED_FLAGS if REFERENCE_FLAGS.get(entry["flag"]) != entry["key"]}
    of_rewards = {flag for flag in ALL_FLAGS if flag.startswith("--reward-")}
    assert moved == of_rewards | BATCH_FLAGS["training.batch_size"].keys()


@pytest.mark.parametrize("entry", SEED_FLAGS, ids=lambda entry: entry["flag"])
def test_default_is_that_of_the_reference(entry: dict) -> None:
    recipe = load_recipe(GRPORecipe, command_line())
    expected = REQUIRED[entry["flag"]] if entry["default"] == "required" else entry["default"]
    if entry["flag"] in TRANSLATED:
        return
    key = ALL_FLAGS[entry["flag"]]
    if key.split(".")[1] in OFF:
        assert recipe.reward.tables.keys().isdisjoint(OFF)
        return
    value = value_of(recipe, key)
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


def test_dropout_is_accepted_at_its_defaults() -> None:
    defaults = {
        "--cls-token-num": "1",
        "--uncond-prob": "0.0",
        "--sample-model-mode": "eval",
    }
    recipe = load_recipe(GRPORecipe, command_line(**defaults))
    assert recipe == load_recipe(GRPORecipe, command_line())


T5 = {"--t5-feat-path": "long"}
TEXT_ONLY = {
    "--t5-feat-path": ("text.llamagen_features", "long", "long"),
    "--short-t5-feat-path": ("text.llamagen_short_features", "short", "short"),
    "--data-start": ("data.first_list", "2", 2),
    "--data-end": ("data.last_list", "4", 4),
    "--dropout-p": ("model.dropout", "0.2", 0.2),
    "--token-dropout-p": ("model.token_dropout", "0.3", 0.3),
}
"""Flags of the reference's text-to-image trainer beside those of the other -> key, text, value."""


@pytest.mark.parametrize("flag", TEXT_ONLY)
def test_flags_of_the_text_trainer_set_their_keys(flag: str) -> None:
    key, text, expected = TEXT_ONLY[flag]
    recipe = load_recipe(GRPORecipe, command_line(**{**T5, flag: text}))
    assert value_of(recipe, key) == expected
    assert REFERENCE_FLAGS[flag] == key


def test_t5_flags_select_the_defaults_of_the_text_trainer() -> None:
    recipe = load_recipe(GRPORecipe, command_line(**T5))
    model = recipe.model
    assert (model.cls_token_num, model.caption_dim, recipe.data.image_size) == (120, 2048, 384)
    assert {name: table.weight for name, table in recipe.reward.tables.items()} == {"reconstruction": 1.0, "lpips": 1.0}
    by_count = load_recipe(GRPORecipe, command_line(**{"--cls-token-num": "120", "--text.encoder": "words"}))
    assert by_count.model == model
    others = {"--cls-token-num": "77", "--image-size": "256", "--reward-perceptual-weight": "0"}
    recipe = load_recipe(GRPORecipe, command_line(**T5, **others))
    assert (recipe.model.cls_token_num, recipe.data.image_size) == (77, 256)
    assert recipe.reward.tables["lpips"].weight == 0


def test_the_text_trainers_defaults_do_not_override_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[data]\npath = "d"\nimage_size = 256\n[reward.reconstruction]\nweight = 1\n')
    flags = ["--config", str(tmp_path / "a.toml"), "--vq-ckpt", "v", "--t5-feat-path", "f"]
    recipe = load_recipe(GRPORecipe, flags)
    assert (recipe.data.image_size, recipe.model.caption_dim) == (256, 2048)
    assert list(recipe.reward.tables) == ["reconstruction"]


def test_condition_rows_need_features() -> None:
    with pytest.raises(UserError, match=r"text.features is required with text.encoder = .t5."):
        load_recipe(GRPORecipe, command_line(**{"--cls-token-num": "120"}))


def test_command_line_and_recipe_file_agree(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text(
        '[tokenizer]\ncheckpoint = "vq.pth"\n[data]\npath = "data"\n[rollout]\nbatch_size = 8\nnum_generations = 8\n'
        '[training]\nbatch_size = 4\nmicro_batch_size = 4\n[checkpoint]\ninterval = 2\ndir = "out"\n'
    )
    flags = "--vq-ckpt vq.pth --data-path data --sample-batch-size 8 --train-batch-size 4 --num-generations 8"
    by_flags = load_recipe(GRPORecipe, [*flags.split(), "--ckpt-every", "2", "--ckpt-dir", "out"])
    assert load_recipe(GRPORecipe, ["--config", str(tmp_path / "train.toml")]) == by_flags


def test_a_flag_and_its_key_together_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(GRPORecipe, [*command_line(), "--lr", "1e-5", "--optimizer.lr=1e-6"])
    assert caught.value.problems == ["--optimizer.lr: optimizer.lr is already set by --lr; give one of them"]
    with pytest.raises(UserError, match=r"^--lr: given twice$"):
        load_recipe(GRPORecipe, [*command_line(), "--lr", "1e-5", "--lr", "1e-6"])


def sizes(*flags: str) -> tuple[int, int | None, int]:
    recipe = load_recipe(GRPORecipe, [*command_line(), *flags])
    return recipe.rollout.batch_size, recipe.training.batch_size, recipe.training.micro_batch_size


def test_batch_flags_count_on_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes() == (32, 8, 8)
    assert sizes("--sample-batch-size", "16", "--gradient-accumulation-steps", "4") == (16, 32, 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert sizes() == (128, 32, 8)
    assert sizes("--train-batch-size", "16") == (128, 64, 16)
    assert sizes("--rollout.batch_size", "16") == (16, 32, 8)


def test_batch_flags_override_a_file_where_they_are_given(tmp_path: Path) -> None:
    (tmp_path / "grpo.toml").write_text("[rollout]\nbatch_size = 8\n[training]\nbatch_size = 16\n")
    config = ("--config", str(tmp_path / "grpo.toml"))
    assert sizes(*config) == (8, 16, 8)
    assert sizes(*config, "--sample-batch-size", "4") == (4, 16, 8)
    assert sizes(*config, "--train-batch-size", "4") == (8, 4, 4)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--sample-batch-size 4 --rollout.batch_size 8", "--rollout.batch_size: rollout.batch_size is already set by"),
        ("--training.batch_size 8 --train-batch-size 8", "--training.batch_size: training.batch_size is already set"),
        ("--training.micro_batch_size 4 --train-batch-size 8", "--train-batch-size: training.micro_batch_size is al"),
        ("--train-batch-size 0", "training.batch_size must be a whole number > 0 or none, not 0"),
        ("--train-batch-size 3", "--sample-batch-size 32: training.batch_size = 3 completions"),
    ],
)
def test_mistakes_in_batch_flags(flags: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(GRPORecipe, [*command_line(), *flags.split()])
    (problem,) = caught.value.problems
    assert line in problem


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ("--reward-use-embedcos --reward-embedcos-weight 0.3", 0.3),
        ("--reward-embedcos-weight 0.3", 0.0),
        ("--reward-use-embedcos false --reward-embedcos-weight 0.3", 0.0),
        ("--reward-use-embedcos", 0.0),
        ("--reward-use-gan false", None),
        ("", None),
    ],
)
def test_switch_of_the_embedding_reward(flags: str, weight: float | None) -> None:
    tables = load_recipe(GRPORecipe, [*command_line(), *flags.split()]).reward.tables
    assert tables["reconstruction"].weight == 1
    assert (tables["embedding_cosine"].weight if "embedding_cosine" in tables else None) == weight


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ("--reward-use-gan", 1.0),
        ("--reward-use-gan --reward-gan-weight 0.3", 0.3),
        ("--reward-use-gan TRUE --reward-gan-weight 0.3", 0.3),
        ("--reward-gan-weight 0.3", 0.0),
        ("", 0.0),
        ("--reward-use-gan false", 0.0),
        ("--reward.patchgan.weight 2", 2.0),
    ],
)
def test_switch_of_the_discriminator(flags: str, weight: float) -> None:
    """Its checkpoint alone makes a table that is off."""
    recipe = load_recipe(GRPORecipe, [*command_line(), *flags.split(), "--reward-disc-ckpt", "disc.pt"])
    assert recipe.reward.tables["patchgan"].weight == weight
    assert ("reconstruction" in recipe.reward.tables) == ("--reward." not in flags)  # a key of our own replaces it


def test_switch_over_a_file(tmp_path: Path) -> None:
    """A table of a file is on, until the switch is set to off."""
    (tmp_path / "r.toml").write_text('[reward.patchgan]\nweight = 3\ncheckpoint = "disc.pt"\n')
    argv = [*command_line(), "--config", str(tmp_path / "r.toml")]
    for flags, table in (
        ([], (3.0, None)),
        (["--reward-disc-dim", "8"], (3.0, 8)),
        (["--reward-use-gan"], (3.0, None)),
        (["--reward-use-gan", "--reward-gan-weight", "2"], (2.0, None)),
    ):
        patchgan = load_recipe(GRPORecipe, [*argv, *flags]).reward.tables["patchgan"]
        assert (patchgan.weight, patchgan.dim) == table
    with pytest.raises(UserError, match="no reward is on"):
        load_recipe(GRPORecipe, [*argv, "--reward-use-gan", "false"])


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_weight_of_lpips(weight: float) -> None:
    tables = load_recipe(GRPORecipe, [*command_line(), "--reward-perceptual-weight", str(weight)]).reward.tables
    assert {name: table.weight for name, table in tables.items()} == {"lpips": weight, "reconstruction": 1.0}


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ("", (0.0, 0.0)),
        ("--sample-model-mode eval", (0.0, 0.0)),
        ("--sample-model-mode train", (0.1, 0.1)),
        ("--sample-model-mode twice", (0.1, 0.1)),
        ("--sample-model-mode train --uncond-prob 0", (0.1, 0.0)),
        ("--sample-model-mode twice --uncond-prob 0.3 --model.dropout 0", (0.0, 0.3)),
        ("--uncond-prob 1", (0.0, 1.0)),
    ],
)
def test_dropout_of_the_update(flags: str, rates: tuple[float, float], tmp_path: Path) -> None:
    """The reference's rates where a mode has dropout, unless flags say otherwise; a saved recipe means the same."""
    recipe = load_recipe(GRPORecipe, [*command_line(), *flags.split()])
    assert (recipe.model.dropout, recipe.model.class_dropout) == rates
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    again = load_recipe(GRPORecipe, ["--config", str(tmp_path / "again.toml")])
    assert (again.model, again.training) == (recipe.model, recipe.training)


def test_published_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, on its 8 processes: value by value, all else at the defaults, and the shipped recipe."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    recipe = load_recipe(GRPORecipe, PUBLISHED.split())
    named = {
        "model.name": "GPT-XXL", "model.checkpoint": "G", "model.from_fsdp": True,
        "model.dropout": 0.1, "model.class_dropout": 0.1,
        "tokenizer.name": "VQ-16", "tokenizer.checkpoint": "V", "tokenizer.downsample_size": 16,
        "data.name": "imagenet", "data.path": "D", "data.image_size": 384,
        "rollout.mode": "teacher_forced", "rollout.batch_size": 16 * 8, "rollout.num_generations": 8,
        "rollout.temperature": 1.0, "rollout.top_k": 0, "rollout.top_p": 1.0, "rollout.use_context_noise": False,
        "reward.reconstruction.distance": "l2", "reward.reconstruction.weight": 1.0, "reward.lpips.weight": 1.0,
        "objective.loss": "grpo", "objective.advantage": "group_std", "objective.advantage_clip": 5.0,
        "objective.clip_range": 0.2, "objective.kl_estimator": "none", "objective.aux_ce_weight": 0.1,
        "optimizer.lr": 1e-6, "optimizer.weight_decay": 1e-4, "optimizer.beta1": 0.9, "optimizer.beta2": 0.999,
        "optimizer.max_grad_norm": 1.0, "optimizer.schedule": "constant",
        "training.steps": 100, "training.batch_size": 8 * 16 * 8, "training.micro_batch_size": 8,
        "training.mixed_precision": "bf16", "training.grad_precision": None, "training.dropout_mode": "train",
        "training.seed": 0, "parallel.data_parallel": "fsdp",
        "checkpoint.interval": 100, "checkpoint.dir": "checkpoints", "checkpoint.sharded": False,
        "metrics.wandb": True, "metrics.wandb_project": "autoreg-grpo", "metrics.wandb_entity": None,
        "metrics.wandb_run_name": "c2i-grpo",
    }  # fmt: skip
    assert {key: value_of(recipe, key) for key in named} == named
    assert recipe.reward.tables.keys() == {"reconstruction", "lpips"}
    assert recipe.schedule(ranks=8).on_policy  # one optimizer step of 128 completions on each process
    plain = load_recipe(GRPORecipe, command_line())
    differing = {line.partition(":")[0] for line in differences(plain, recipe)}
    given = {ALL_FLAGS[word] for word in PUBLISHED.split() if word.startswith("--")} | {"reward.lpips.kind"}
    defaults = {f"reward.lpips.{key}" for key in ("backbone", "normalise", "separate")}  # of a table that is new
    assert differing <= given | defaults | {"model.dropout", "model.class_dropout", "training.batch_size"}

    shipped = load_recipe(GRPORecipe, ["--config", "vapi_xxl_384"])
    for section in ("rollout", "training", "reward", "objective", "optimizer"):
        assert getattr(recipe, section) == getattr(shipped, section)
    rates = {"dropout", "class_dropout", "name"}
    assert recipe.model.model_dump(include=rates) == shipped.model.model_dump(include=rates)


def test_other_jobs_take_keys_only() -> None:
    with pytest.raises(UserError, match="--epochs: unknown flag"):
        load_recipe(PretrainRecipe, ["--data.name", "synthetic", "--epochs", "3"])
    assert "training.steps" in section_keys(PretrainRecipe.sections())
