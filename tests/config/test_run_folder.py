"""A run's folder stands for the settings with which its generator is drawn from."""

from pathlib import Path

import pytest

from grpo.config import (
    RECIPES,
    EvaluateRecipe,
    GenerateRecipe,
    GRPORecipe,
    ShareRecipe,
    TokenizerRecipe,
    UserError,
    help_text,
    load_recipe,
    of_run,
    shared_recipe,
)

OUTPUT = ("--share.output", "shared")


def run_folder(folder: Path, **rollout: object) -> Path:
    recipe = GRPORecipe.model_validate(
        {
            "data": {"name": "classes", "image_size": 32},
            "tokenizer": {"name": "VQ-tiny", "checkpoint": "vq.safetensors"},
            "model": {"name": "GPT-tiny", "num_classes": 10},
            "rollout": {"mode": "autoregressive", **rollout},
            "reward": {"jpeg_size": {}},
            "judge": {"feature_checkpoint": "judge.safetensors"},
        }
    )
    (folder / "recipe.toml").write_text(recipe.to_toml())
    (folder / "model.safetensors").touch()
    return folder


def test_generator_tokenizer_and_sampling_are_those_of_the_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, cfg_scale=1.5, temperature=0.9)
    recipe = load_recipe(GenerateRecipe, of_run(GenerateRecipe, [str(folder)]))
    assert recipe.model.checkpoint == str(folder / "model.safetensors")
    assert (recipe.model.name, recipe.model.num_classes) == ("GPT-tiny", 10)
    assert (recipe.tokenizer.name, recipe.tokenizer.checkpoint) == ("VQ-tiny", "vq.safetensors")
    assert (recipe.sampling.cfg_scale, recipe.sampling.temperature, recipe.sampling.image_size) == (1.5, 0.9, 32)
    assert recipe.output.grid == str(folder / "grid.png")


def test_what_the_arguments_set_wins(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, cfg_scale=1.5)
    given = ["--sampling.cfg_scale=2", "--output.npz", "x.npz", "--model.checkpoint", "other.pt"]
    recipe = load_recipe(GenerateRecipe, of_run(GenerateRecipe, [str(folder), *given]))
    assert (recipe.sampling.cfg_scale, recipe.output.grid, recipe.model.checkpoint) == (2, None, "other.pt")
    recipe = load_recipe(GenerateRecipe, of_run(GenerateRecipe, [str(folder), "--output.num_images", "3"]))
    assert (recipe.output.num_images, recipe.output.grid) == (3, str(folder / "grid.png"))


def test_an_evaluation_takes_data_and_judge_too(tmp_path: Path) -> None:
    arguments = of_run(EvaluateRecipe, [str(run_folder(tmp_path)), "--evaluation.reference", "digits.npz"])
    recipe = load_recipe(EvaluateRecipe, arguments)
    assert (recipe.data.name, recipe.data.image_size) == ("classes", 32)
    assert recipe.evaluation.feature_checkpoint == "judge.safetensors"


def test_a_run_that_has_not_ended_is_drawn_from_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights yet"):
        of_run(GenerateRecipe, [str(folder)])
    for step in (5, 10):
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert str(folder / "checkpoints" / "step-000010") in of_run(GenerateRecipe, [str(folder)])


def test_what_is_no_run_of_a_generator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run's folder"):
        of_run(GenerateRecipe, [str(tmp_path)])
    (tmp_path / "recipe.toml").write_text(TokenizerRecipe.model_validate({"data": {"name": "synthetic"}}).to_toml())
    with pytest.raises(UserError, match="is not of a run that trained a generator"):
        of_run(GenerateRecipe, [str(tmp_path)])
    (tmp_path / "recipe.toml").write_bytes(b'job = "train"\n\xff')
    with pytest.raises(UserError, match=r"recipe\.toml"):
        of_run(GenerateRecipe, [str(tmp_path)])


def test_a_shared_folder_stands_for_its_settings(tmp_path: Path) -> None:
    of_training = load_recipe(ShareRecipe, of_run(ShareRecipe, [str(run_folder(tmp_path, cfg_scale=1.5)), *OUTPUT]))
    assert of_training.share.run == str(tmp_path)
    (tmp_path / "generator.toml").write_text(shared_recipe(of_training))
    recipe = load_recipe(GenerateRecipe, of_run(GenerateRecipe, [str(tmp_path), "--sampling.top_k", "5"]))
    assert (recipe.model.checkpoint, recipe.model.name) == (str(tmp_path / "model.safetensors"), "GPT-tiny")
    assert recipe.tokenizer.checkpoint == str(tmp_path / "tokenizer.safetensors")
    assert (recipe.sampling.cfg_scale, recipe.sampling.image_size, recipe.sampling.top_k) == (1.5, 32, 5)


@pytest.mark.parametrize(
    "text",
    [
        '[output]\nnpz = "/home/me/x.npz"',
        '[text]\npath = "/"',
        '[model]\ncheckpoint = "x"',
        "[model]\nname = [1]",
        "x",
        "a = 1",
    ],
)
def test_a_shared_folder_names_no_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "generator.toml").write_text(text)
    with pytest.raises(UserError, match=r"generator\.toml is not that of a shared generator"):
        of_run(GenerateRecipe, [str(tmp_path)])


def test_a_value_from_a_folder_is_never_a_flag(tmp_path: Path) -> None:
    (tmp_path / "generator.toml").write_text('[model]\nname = "--output.npz=/elsewhere.npz"\n')
    words = of_run(GenerateRecipe, [str(tmp_path)])
    assert "--model.name=--output.npz=/elsewhere.npz" in words
    recipe = load_recipe(GenerateRecipe, words)
    assert (recipe.model.name, recipe.output.npz) == ("--output.npz=/elsewhere.npz", None)


def test_a_name_that_is_too_long_is_no_folder() -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        of_run(GenerateRecipe, ["a" * 5000])
    with pytest.raises(UserError, match=r"grpo share takes a run's folder first"):
        of_run(ShareRecipe, [])


def test_a_run_with_a_random_tokenizer_is_told_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(
        text.replace('checkpoint = "vq.safetensors"\n', "").replace('"classes"', '"synthetic"')
    )
    with pytest.raises(UserError, match="its tokenizer had random weights"):
        of_run(GenerateRecipe, [str(folder)])
    assert "vq.pt" in of_run(GenerateRecipe, [str(folder), "--tokenizer.checkpoint", "vq.pt"])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        of_run(GenerateRecipe, [str(tmp_path / "gone")])


@pytest.mark.parametrize("job", ["generate", "evaluate", "share", "demo"])
def test_help_tells_that_a_run_may_be_given(job: str) -> None:
    assert f"usage: grpo {job} [RUN | --config NAME]" in help_text(RECIPES[job])
