"""`grpo generate RUN` and `grpo evaluate RUN`: the settings of a run as flags, so that its generator is used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.config.errors import UserError
from grpo.config.load import job_of_file, recipe_from_toml
from grpo.config.recipe import EXPORT_NAME, Recipe
from grpo.config.recipes import GeneratorRecipe, GRPORecipe
from grpo.config.registry import RECIPES
from grpo.config.user_files import read_text, reading

DRAWN_ALIKE = ("temperature", "top_k", "top_p", "cfg_scale", "cfg_interval")
NOT_TAKEN = {"model": {"checkpoint", "from_fsdp", "new_classes", "trained"}}


def of_run(recipe_class: type[Recipe], arguments: Sequence[str]) -> list[str]:
    """Arguments of a job that draws, with a run's folder as their first word turned into flags.

    The flags name the run's weights, tokenizer and judge and have its model, text, data and image size. Images are
    drawn as the rollouts were, where they were free samples, into a grid in the folder unless `output` says where else.
    What the arguments set themselves wins.

    Raises:
        UserError: the folder is no run of a generator, or has no weights yet.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    folder, own = Path(arguments[0]), list(arguments[1:])
    given = {word.partition("=")[0] for word in own if word.startswith("--")}
    given |= {"--output.grid"} if given & {"--output.folder", "--output.npz"} else set()
    sections = recipe_class.sections()
    flags = [
        word
        for section, values in _settings(folder).items()
        for key, value in values.items()
        if section in sections and key in sections[section].model_fields and f"--{section}.{key}" not in given
        for word in (f"--{section}.{key}", _text(value))
    ]
    return [*flags, *own]


def _settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Keys by section, without those that have their defaults."""
    file = folder / "recipe.toml"
    if not file.is_file():
        raise UserError(f"{folder}: is no run's folder, it has no recipe.toml; flags begin with --")
    job = job_of_file(str(file))
    if job is None or not issubclass(RECIPES[job], GeneratorRecipe):
        raise UserError(f"{file}: is not of a run that trained a generator")
    with reading(f"{file} cannot be read"):
        recipe = recipe_from_toml(RECIPES[job], read_text(file), origin=str(file))
    settings = {
        name: getattr(recipe, name).model_dump(exclude_defaults=True, exclude_none=True)
        for name in ("model", "text", "tokenizer", "data")
    }
    for section, keys in NOT_TAKEN.items():
        settings[section] = {key: value for key, value in settings[section].items() if key not in keys}
    settings["model"]["checkpoint"] = _weights(folder)
    settings["output"] = {"grid": folder / "grid.png"}
    if recipe.judge.feature_checkpoint is not None:
        settings["evaluation"] = {"feature_checkpoint": recipe.judge.feature_checkpoint}
    settings["sampling"] = {"image_size": recipe.data.image_size, "mixed_precision": recipe.training.mixed_precision}
    if isinstance(recipe, GRPORecipe) and recipe.rollout.mode == "autoregressive":
        settings["sampling"] |= recipe.rollout.model_dump(include={*DRAWN_ALIKE}, exclude_defaults=True)
    return settings


def _weights(folder: Path) -> Path:
    """The final weights, or those of the newest checkpoint where the run has not ended."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"))
    for candidate in (folder / EXPORT_NAME, *reversed(checkpoints)):
        if candidate.exists():
            return candidate
    raise UserError(f"{folder} has no weights yet: neither {EXPORT_NAME} nor a checkpoint in checkpoints/")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
