"""Combinations, notes, the saved recipe, the committed recipes and the reference page."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import tomli
from pydantic import ValidationError

from grpo.config import (
    RECIPES,
    EvaluateRecipe,
    GenerateRecipe,
    GRPORecipe,
    Model,
    Objective,
    PretrainRecipe,
    Recipe,
    Rollout,
    Schedule,
    TokenizerRecipe,
    UserError,
    changes_that_matter,
    differences,
    load_recipe,
    recipe_from_toml,
)
from grpo.config.help import markdown
from grpo.config.keys import section_keys
from grpo.config.recipe import ORDER
from grpo.models import get_family, get_tokenizer_spec

ROOT = Path(__file__).parents[2]
SYNTHETIC = {"data": {"name": "synthetic"}}
AUTOREGRESSIVE = {
    "rollout": {"mode": "autoregressive"},
    "reward": {"class_log_prob": {"checkpoint": "c.pth"}},
}
CODES = {"tokenizer": {"checkpoint": "vq.pt"}}
GENERATE = {"model": {"checkpoint": "gpt.pt"}, "tokenizer": {"checkpoint": "vq.pt"}, "output": {"grid": "grid.png"}}
EVALUATE = {"evaluation": {"images": "images.npz", "reference": "ref.npz", "feature_checkpoint": "judge.pth"}}


def merged(*settings: Mapping[str, Mapping]) -> dict[str, dict]:
    sections = dict.fromkeys(name for setting in settings for name in setting)
    return {name: {k: v for setting in settings for k, v in setting.get(name, {}).items()} for name in sections}


def problem_texts(recipe_class: type[Recipe], settings: Mapping) -> list[str]:
    sections = {name: recipe_class.sections()[name].model_validate(keys) for name, keys in settings.items()}
    return [*recipe_class.model_construct(**sections).problems()]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rollout": {"num_generations": 1}}, "rollout.num_generations must be at least 2"),
        ({"rollout": {"cfg_scale": 1.5}}, "rollout.cfg_scale: guidance needs"),
        ({"rollout": {"batch_size": 3}, "training": {"batch_size": 16}}, "must divide rollout.batch_size x rollout.n"),
        ({"training": {"batch_size": 512}}, "must divide rollout.batch_size x rollout.num_generations = 256"),
        ({"rollout": {"batch_size": 3}, "training": {"batch_size": 12}}, "must be a multiple or a divisor of rollout"),
        ({"reward": {"reconstruction": {"weight": 0}}}, "no reward is on"),
        ({"objective": {"reference": "ema"}}, 'objective.reference = "ema" needs training.ema_decay'),
        (
            {"objective": {"reference": "ema", "reference_checkpoint": "x"}, "training": {"ema_decay": 0.9}},
            'objective.reference_checkpoint needs objective.reference = "start"',
        ),
        ({"objective": {"entropy_target": 0.8}}, "objective.entropy_target needs objective.entropy_weight above 0"),
        ({"model": {"cls_token_num": 120}}, "model.cls_token_num above 1 needs model.caption_dim"),
        ({"model": {"new_classes": 4}}, "model.new_classes must be 0 in GRPO"),
        ({"data": {"image_size": 100}}, "data.image_size = 100 must be a multiple of"),
        ({"data": {"name": "digits"}}, "tokenizer.checkpoint is required"),
        (
            {"data": {"name": "folder"}, "tokenizer": {"checkpoint": "v"}},
            'data.path is required with data.name = "folder"',
        ),
    ],
)
def test_impossible_teacher_forced_settings(settings: Mapping, text: str) -> None:
    (problem,) = problem_texts(GRPORecipe, merged(SYNTHETIC, settings))
    assert text in problem


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"reward": {"reconstruction": {}}}, "reward.reconstruction.weight must be 0"),
        ({"reward": {"twin": {"kind": "embedding_cosine"}}}, "reward.twin.weight must be 0"),
        ({"rollout": {"use_context_noise": True}}, "rollout.use_context_noise: needs"),
        (
            {"rollout": {"importance_weight_cap": 2, "cfg_scale": 2, "guidance_in_loss": "conditional"}},
            "rollout.importance_weight_cap with guidance needs",
        ),
    ],
)
def test_impossible_autoregressive_settings(settings: Mapping, text: str) -> None:
    (problem,) = problem_texts(GRPORecipe, merged(SYNTHETIC, AUTOREGRESSIVE, settings))
    assert problem.startswith(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout": {"num_generations": 1}, "objective": {"advantage": "batch_std"}},
        {"rollout": {"batch_size": 8, "num_generations": 8}, "training": {"batch_size": 4}},
        {"rollout": {"batch_size": 16}, "training": {"batch_size": 128}},
        {"rollout": {"batch_size": 6}, "training": {"batch_size": 24}},
        AUTOREGRESSIVE,
        merged(AUTOREGRESSIVE, {"rollout": {"cfg_scale": 2, "importance_weight_cap": 2, "top_k": 9}}),
    ],
)
def test_possible_settings(settings: Mapping) -> None:
    assert problem_texts(GRPORecipe, merged(SYNTHETIC, settings)) == []


def test_what_needs_images_is_told_where_there_are_none() -> None:
    classes = {"data": {"name": "classes"}, "tokenizer": {"checkpoint": "vq.pt"}}
    assert problem_texts(GRPORecipe, merged(AUTOREGRESSIVE, classes)) == []
    start = 'data.name = "classes" has no images: '
    assert problem_texts(GRPORecipe, merged(classes, {"objective": {"aux_ce_weight": 0.1}})) == [
        start + 'rollout.mode must be "autoregressive": a teacher-forced context is the codes of a real image',
        start + "reward.reconstruction.weight must be 0: it compares with the real image",
        start + "objective.aux_ce_weight must be 0: it is the cross-entropy on the codes of real images",
    ]
    (problem,) = problem_texts(GRPORecipe, merged(AUTOREGRESSIVE, classes, {"objective": {"aux_ce_weight": 0.1}}))
    assert problem.startswith(start + "objective.aux_ce_weight")
    fid = {"reward": {"loo_fid": {"checkpoint": "inception.pth"}}}
    assert problem_texts(GRPORecipe, merged(AUTOREGRESSIVE, classes, fid)) == [
        start + "reward.loo_fid.reference is required: there are no real images to measure"
    ]


@pytest.mark.parametrize(
    ("recipe_class", "base", "settings", "text"),
    [
        (GenerateRecipe, GENERATE, {"model": {"checkpoint": None}}, "model.checkpoint is required"),
        (GenerateRecipe, GENERATE, {"output": {"grid": None}}, "nothing to write"),
        (GenerateRecipe, GENERATE, {"model": {"new_classes": 4}}, "model.new_classes must be 0"),
        (
            PretrainRecipe,
            SYNTHETIC,
            {"model": {"num_classes": 3, "new_classes": 4}},
            "model.new_classes = 4 must be at",
        ),
        (
            PretrainRecipe,
            merged(SYNTHETIC, CODES),
            {"data": {"name": "classes"}},
            'data.name = "classes" has no images: `grpo pretrain` tra',
        ),
        (
            TokenizerRecipe,
            SYNTHETIC,
            {"data": {"name": "classes"}},
            'data.name = "classes" has no images: `grpo tokenizer',
        ),
        (EvaluateRecipe, EVALUATE, {"data": {"name": "classes"}, "evaluation": {"reference": None}}, 'data.name = "cl'),
        (GenerateRecipe, GENERATE, {"sampling": {"image_size": 250}}, "sampling.image_size = 250 must be a multiple"),
        (GenerateRecipe, GENERATE, {"sampling": {"class_ids": [3, 1000]}}, "sampling.class_ids must be below"),
        (EvaluateRecipe, EVALUATE, {"evaluation": {"feature_checkpoint": None}}, "evaluation.feature_checkpoint or "),
        (EvaluateRecipe, EVALUATE, {"evaluation": {"reference": None}}, "data.path is required with data.name = "),
        (
            EvaluateRecipe,
            merged(EVALUATE, {"model": {"checkpoint": "gpt.pt"}, "tokenizer": {"checkpoint": "vq.pt"}}),
            {
                "evaluation": {"images": None, "reference": None},
                "data": {"name": "digits"},
                "sampling": {"resize_to": 128},
            },
            "sampling.resize_to must equal data.image_size = 256",
        ),
        (
            TokenizerRecipe,
            merged(SYNTHETIC, {"data": {"image_size": 16}}),
            {"adversary": {"weight": 0.5}},
            "adversary.num_layers = 3 needs data.image_size of at least 24",
        ),
        (
            TokenizerRecipe,
            {"data": {"name": "synthetic", "image_size": 8}, "tokenizer": {"downsample_size": 4}},
            {"tokenizer_loss": {"perceptual_weight": 1}},
            "tokenizer_loss.perceptual_weight: LPIPS needs data.image_size of at least 16, not 8",
        ),
    ],
)
def test_impossible_settings_of_other_jobs(
    recipe_class: type[Recipe], base: Mapping, settings: Mapping, text: str
) -> None:
    assert problem_texts(recipe_class, base) == []
    (problem,) = problem_texts(recipe_class, merged(base, settings))
    assert problem.startswith(text)


def test_a_recipe_object_is_valid() -> None:
    with pytest.raises(ValidationError, match=r"rollout.num_generations must be at least 2.*; no reward is on"):
        GRPORecipe.model_validate(
            merged(SYNTHETIC, {"rollout": {"num_generations": 1}, "reward": {"reconstruction": {"weight": 0}}})
        )


@pytest.mark.parametrize(
    ("settings", "subject"),
    [
        ({"objective": {"kl_coef": 0.1}}, "objective.kl_coef"),
        ({"objective": {"reference_checkpoint": "gpt.pt"}}, "objective.reference_checkpoint"),
        ({"objective": {"token_dropout": 0.1}}, "objective.token_dropout"),
        ({"objective": {"advantage": "gdpo"}}, "objective.advantage"),
        ({"rollout": {"context_noise": 0.1}}, "rollout.context_noise"),
        ({"rollout": {"importance_weight_cap": 2}}, "rollout.importance_weight_cap"),
        ({"rollout": {"guidance_in_loss": "conditional"}}, "rollout.guidance_in_loss"),
        ({"rollout": {"max_rows": 8}}, "rollout.max_rows"),
        ({"model": {"dropout": 0.1}}, "model.dropout"),
        ({"model": {"class_dropout": 0.1}}, "model.class_dropout"),
        ({"training": {"dropout_mode": "train"}}, "training.dropout_mode has no effect: model.dropout and model.class"),
        ({"rollout": {"keep_memory": 0.2}}, "rollout.keep_memory"),
        (
            {"reward": {"reconstruction": {}, "embedding_cosine": {"weight": 0}}},
            "reward.embedding_cosine",
        ),
        ({"optimizer": {"schedule": "one_cycle", "warmup_steps": 3}}, "optimizer.warmup_steps"),
        ({"metrics": {"wandb_entity": "team"}}, "metrics.wandb_entity"),
        ({"data": {"name": "synthetic", "classes": ["1"]}}, "data.classes"),
        ({"checkpoint": {"keep_best": 1}}, "checkpoint.keep_best"),
        ({"checkpoint": {"best_metric": "loss"}}, "checkpoint.best_metric"),
        ({"checkpoint": {"save_final": False}}, "checkpoint.interval = 0 and checkpoint.save_final = false"),
    ],
)
def test_settings_without_effect_are_noted(settings: Mapping, subject: str) -> None:
    assert GRPORecipe.model_validate(SYNTHETIC).notes() == []
    (note,) = GRPORecipe.model_validate(merged(SYNTHETIC, settings)).notes()
    assert note.startswith(subject)


def test_dropout_in_the_update_is_remarked() -> None:
    settings = {"training": {"dropout_mode": "twice"}, "model": {"dropout": 0.1}}
    recipe = GRPORecipe.model_validate(merged(SYNTHETIC, settings))
    (remark,) = recipe.remarks()
    assert "reference trainer" in remark
    assert recipe.notes() == GRPORecipe.model_validate(SYNTHETIC).remarks() == []


@pytest.mark.parametrize("shares", [True, False])
def test_a_judge_that_rewards_is_remarked(shares: bool) -> None:
    judge = {"interval": 5, "feature_checkpoint": "rewards.safetensors" if shares else "judge.safetensors"}
    tables = {"class": {"kind": "class_log_prob", "weight": 1.0, "checkpoint": "rewards.safetensors"}}
    remarks = GRPORecipe.model_validate({**SYNTHETIC, "judge": judge, "reward": tables}).remarks()
    assert ["is that of reward.class:" in remark for remark in remarks] == [True] * shares


def test_notes_of_other_jobs() -> None:
    by_gradient = {"tokenizer_loss": {"codebook_update": "gradient", "codebook_ema": 0.5}}
    (note,) = TokenizerRecipe.model_validate(merged(SYNTHETIC, by_gradient)).notes()
    assert note == 'tokenizer_loss.codebook_ema has no effect: codebook_update is "gradient"'
    (note,) = PretrainRecipe.model_validate(merged(SYNTHETIC, {"training": {"dropout_mode": "train"}})).notes()
    assert note == "training.dropout_mode has no effect: only `train` has rollouts"
    adversary = {"adversary": {"weight": 0.5, "start": 101, "dim": 8}}
    (note,) = TokenizerRecipe.model_validate(merged(SYNTHETIC, adversary)).notes()
    assert note == "adversary.weight has no effect: adversary.start = 101 is after the last step"
    (note,) = TokenizerRecipe.model_validate(merged(SYNTHETIC, {"adversary": {"dim": 8}})).notes()
    assert note == "adversary.dim has no effect: adversary.weight is 0"
    without_images = {"data": {"name": "classes", "class_map": "m.txt", "cache_codes": True}, **CODES}
    notes = GRPORecipe.model_validate(merged(AUTOREGRESSIVE, without_images)).notes()
    assert [note.split()[0] for note in notes] == ["data.class_map", "data.cache_codes"]
    (note,) = PretrainRecipe.model_validate(merged(SYNTHETIC, {"model": {"new_classes": 4}})).notes()
    assert note.startswith("model.new_classes has no effect: all classes of random weights are new")
    (note,) = EvaluateRecipe.model_validate(merged(EVALUATE, {"sampling": {"top_k": 3}})).notes()
    assert note == "sampling.top_k has no effect: evaluation.images are not drawn from a model"


def test_switches_of_the_reference_trainer_take_effect() -> None:
    assert Objective().kl_estimator == "none"
    assert Objective(use_kl_loss=True).kl_estimator == "k3"
    assert Objective(use_kl_loss=True, kl="k1").kl_estimator == "k1"
    assert (Objective(clip_range=0.2).clip_low, Objective(clip_range=0.2).clip_high) == (0.2, 0.2)
    assert Objective(clip_range=0.2, clip_range_high=0.28).clip_high == 0.28
    assert Objective(clip_range=0.2, clip_range_high=0).clip_high == 0
    assert (Objective().token_dropout_share, Objective(use_token_dropout=True).token_dropout_share) == (0, 0.5)
    assert (Rollout().context_noise_share, Rollout(use_context_noise=True).context_noise_share) == (0, 0.5)


@pytest.mark.parametrize(
    "recipe",
    [
        load_recipe(GRPORecipe, ["--vq-ckpt", 'a "b"\\c', "--data-path", "ä", "--lr", "1e-30", "--use-wandb"]),
        load_recipe(PretrainRecipe, ["--data.name", "synthetic", "--training.grad_precision", "bf16"]),
        GenerateRecipe.model_validate(merged(GENERATE, {"sampling": {"class_ids": [1, 2]}})),
        EvaluateRecipe.model_validate(EVALUATE),
        load_recipe(GRPORecipe, ["--config", "c2i_classes_only", "--data.classes", "goldfish,n01440764,7"]),
    ],
    ids=lambda recipe: f"{recipe.job}-{recipe.data.name}" if hasattr(recipe, "data") else recipe.job,
)
def test_saved_recipe_loads_as_it_is(recipe: Recipe, tmp_path: Path) -> None:
    text = recipe.to_toml()
    assert recipe_from_toml(type(recipe), text) == recipe
    (tmp_path / "other_name.toml").write_text(text, encoding="utf-8")
    assert load_recipe(type(recipe), ["--config", str(tmp_path / "other_name.toml")]) == recipe
    saved = tomli.loads(text)
    optional = {name for name, key in section_keys(type(recipe).sections()).items() if key.is_optional}
    written = {f"{section}.{key}" for section in recipe.sections() for key in saved[section]}
    assert saved["job"] == recipe.job
    assert section_keys(type(recipe).sections()).keys() - written <= optional


def test_files_of_all_sections_have_one_order() -> None:
    assert " ".join(GRPORecipe.sections()) == (
        "model lora text tokenizer data rollout reward objective optimizer training parallel compile "
        "activation_checkpoint "
        "checkpoint metrics judge debug"
    )
    assert all(name in ORDER for recipe_class in RECIPES.values() for name in recipe_class.sections())


def test_differences_name_key_and_values() -> None:
    before = GRPORecipe.model_validate(SYNTHETIC)
    after = GRPORecipe.model_validate(
        merged(SYNTHETIC, {"optimizer": {"lr": 0.1}, "objective": {"clip_range_high": 0.3}})
    )
    assert differences(before, before) == []
    assert differences(before, after) == ["objective.clip_range_high: None -> 0.3", "optimizer.lr: 1e-05 -> 0.1"]


def test_changes_that_matter_on_resumption() -> None:
    before = GRPORecipe.model_validate(merged(SYNTHETIC, {"reward": {"reconstruction": {}}}))
    free = {
        "training": {"steps": 7, "micro_batch_size": 2, "max_skipped_steps": 1},
        "data": {"num_workers": 0, "cache_codes": True, "max_bad_images": 1},
        "rollout": {"max_rows": 9, "keep_memory": 0},
        "reward": {"reconstruction": {}, "batch_size": 5},
        "parallel": {"timeout": 5},
        "checkpoint": {"interval": 1},
    }
    assert len(differences(before, GRPORecipe.model_validate(merged(SYNTHETIC, free)))) == 11
    assert changes_that_matter(before, GRPORecipe.model_validate(merged(SYNTHETIC, free))) == []
    bound = {
        "training": {"batch_size": 64},
        "reward": {"reconstruction": {"weight": 2}, "embedding_cosine": {}, "precision": "fp32"},
    }
    assert set(changes_that_matter(before, GRPORecipe.model_validate(merged(SYNTHETIC, bound)))) == {
        "training.batch_size: 256 -> 64",
        "reward.precision: 'auto' -> 'fp32'",
        "reward.reconstruction.weight: 1.0 -> 2.0",
        "reward.embedding_cosine.kind: None -> 'embedding_cosine'",
        "reward.embedding_cosine.weight: None -> 1.0",
        "reward.embedding_cosine.normalise: None -> 'none'",
        "reward.embedding_cosine.separate: None -> False",
    }


RECIPE_FILES = sorted((ROOT / "train_configs").rglob("*.toml"))


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_committed_recipe_loads(path: Path) -> None:
    job = tomli.loads(path.read_text(encoding="utf-8"))["job"]
    recipe = load_recipe(RECIPES[job], ["--config", str(path)])
    assert recipe.notes() == []
    if "model" in recipe.sections():
        get_family(recipe.model.name)
    if "tokenizer" in recipe.sections():
        sizes = get_tokenizer_spec(recipe.tokenizer.name).config()
        assert recipe.tokenizer.downsample_size == sizes.downsample_size


def test_published_run_has_its_size() -> None:
    recipe = load_recipe(GRPORecipe, ["--config", str(ROOT / "train_configs" / "published" / "vapi_xxl_384.toml")])
    rollout, training = recipe.rollout, recipe.training
    assert training.steps * rollout.batch_size * rollout.num_generations == 102_400
    assert (rollout.batch_size, training.batch_size, training.micro_batch_size) == (128, 1024, 8)
    for ranks in (1, 8, 16):
        schedule = Schedule.of(rollout=rollout, training=training, objective=recipe.objective, ranks=ranks)
        assert schedule.on_policy
        assert schedule.completions * ranks == 1024


def test_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page.endswith("\n\n" + markdown()), "run python -m grpo.config docs/configuration.md"


@pytest.mark.parametrize("recipe_class", RECIPES.values(), ids=RECIPES)
def test_every_key_is_documented(recipe_class: type[Recipe]) -> None:
    assert all(key.meaning.endswith((".", "...")) for key in section_keys(recipe_class.sections()).values())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("GPT-B", "weights of the generator GPT-B, such as LlamaGen's c2i_B_256.pt"),
        ("GPT-XXL", "weights of the generator GPT-XXL, such as LlamaGen's c2i_XXL_384.pt"),
        ("GPT-tiny", "weights of the generator GPT-tiny"),
    ],
)
def test_a_missing_generator_is_told_with_a_file_of_its_size(name, wanted):
    assert list(Model(name=name, checkpoint="none.pt").missing_files()) == [
        f"checkpoint: none.pt does not exist; wanted: {wanted}"
    ]


def test_an_address_in_place_of_a_file_is_told():
    (line,) = Model(checkpoint="s3://bucket/run/step-000100").missing_files()
    assert line.startswith("checkpoint: s3://bucket/run/step-000100 is an address: bring it to a file or folder here")


def test_checkpoints_that_end_with_the_process_are_refused():
    with pytest.raises(UserError, match=r"checkpoint\.dir = memory://x is gone when the process ends"):
        load_recipe(GRPORecipe, ["--config", "debug", "--checkpoint.dir", "memory://x"])
