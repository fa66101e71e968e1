"""`grpo generate RUN`, evaluate, share and demo: the settings of a run as flags, so that its generator is used."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from grpo.config.errors import UserError
from grpo.config.grid import as_arguments
from grpo.config.load import LARGEST_RECIPE, job_of_file, recipe_from_toml
from grpo.config.recipe import EXPORT_NAME, Recipe
from grpo.config.recipes import GeneratorRecipe, GRPORecipe
from grpo.config.registry import RECIPES
from grpo.config.user_files import read_text, reading, shorten

SHARED_RECIPE, SHARED_TOKENIZER = "generator.toml", "tokenizer.safetensors"
"""In a folder that `grpo share` wrote, beside the weights."""
DRAWN_ALIKE = ("temperature", "top_k", "top_p", "cfg_scale", "cfg_interval")
SHARED_KEYS = {
    "model": ("name", "num_classes", "cls_token_num", "caption_dim"),
    "text": ("encoder",),
    "tokenizer": ("name", "codebook_size", "codebook_embed_dim", "downsample_size"),
    "sampling": ("image_size", *DRAWN_ALIKE),
}
"""What is in its recipe: nothing that names a file, for it may come from anyone."""
NOT_TAKEN = {"model": {"checkpoint", "from_fsdp", "new_classes", "trained"}}


def of_run(recipe_class: type[Recipe], arguments: Sequence[str]) -> list[str]:
    """Arguments of a job that draws, with a run's folder as their first word turned into flags.

    The flags name the run's weights, tokenizer and judge and have its model, text, data and image size. Images are
    drawn as the rollouts were, where they were free samples, into a grid in the folder unless `output` says where else.
    What the arguments set themselves wins. A folder that `grpo share` wrote may stand in place of a run's.

    Raises:
        UserError: there are no arguments; or the folder is no run of a generator, has no weights yet, or its tokenizer
            was a random one.
    """
    if not arguments:
        job = next(name for name, recipe in RECIPES.items() if recipe is recipe_class)
        raise UserError(f"grpo {job} takes a run's folder first, such as runs/quickstart/grpo, or flags: see --help")
    if arguments[0].startswith("-"):
        return list(arguments)
    folder, own = Path(arguments[0]), list(arguments[1:])
    given = {word.partition("=")[0] for word in own if word.startswith("--")}
    given |= {"--output.grid"} if given & {"--output.folder", "--output.npz"} else set()
    sections = recipe_class.sections()
    settings = _shared_settings(folder) if os.path.isfile(folder / SHARED_RECIPE) else _settings(folder)
    if "checkpoint" not in settings["tokenizer"] and not given & {"--tokenizer.checkpoint", "--config"}:
        raise UserError(f"{folder}: its tokenizer had random weights, so it has no images; give --tokenizer.checkpoint")
    settings["output"] = {"grid": folder / "grid.png"}
    flags = [
        (f"--{section}.{key}", _text(value))
        for section, values in settings.items()
        for key, value in values.items()
        if section in sections and key in sections[section].model_fields and f"--{section}.{key}" not in given
    ]
    return [*as_arguments(flags), *own]


def _settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Keys by section, without those that have their defaults."""
    file = folder / "recipe.toml"
    if not os.path.exists(folder):  # False for a name that is too long, too
        raise UserError(f"{shorten(str(folder))}: there is no such folder of a run; flags begin with --")
    if not os.path.isfile(file):
        raise UserError(f"{shorten(str(folder))}: is no run's folder, it has no recipe.toml; flags begin with --")
    job = job_of_file(str(file))
    if job is None or not issubclass(RECIPES[job], GeneratorRecipe):
        raise UserError(f"{file}: is not of a run that trained a generator")
    with reading(f"{file} cannot be read"):
        recipe = recipe_from_toml(RECIPES[job], read_text(file), origin=str(file))
    assert isinstance(recipe, GeneratorRecipe)
    settings = {
        name: getattr(recipe, name).model_dump(exclude_defaults=True, exclude_none=True)
        for name in ("model", "text", "tokenizer", "data")
    }
    for section, keys in NOT_TAKEN.items():
        settings[section] = {key: value for key, value in settings[section].items() if key not in keys}
    settings["model"]["checkpoint"] = _weights(folder)
    settings["share"] = {"run": folder}
    if recipe.judge.feature_checkpoint is not None:
        settings["evaluation"] = {"feature_checkpoint": recipe.judge.feature_checkpoint}
    settings["sampling"] = {"image_size": recipe.data.image_size, "mixed_precision": recipe.training.mixed_precision}
    if isinstance(recipe, GRPORecipe) and recipe.rollout.mode == "autoregressive":
        settings["sampling"] |= recipe.rollout.model_dump(include={*DRAWN_ALIKE}, exclude_defaults=True)
    return settings


def shared_recipe(recipe: Recipe) -> str:
    """The file `SHARED_RECIPE` for the weights of a recipe that draws."""
    sections = {name: getattr(recipe, name).model_dump(include={*keys}) for name, keys in SHARED_KEYS.items()}
    return tomli_w.dumps(
        {name: {key: value for key, value in part.items() if value is not None} for name, part in sections.items()}
    )


def _shared_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Keys by section, of a folder that `grpo share` wrote."""
    file = folder / SHARED_RECIPE
    with reading(f"{file} is not that of a shared generator"):
        settings = tomli.loads(read_text(file, largest=LARGEST_RECIPE))
        for name, part in settings.items():
            for key, value in part.items():
                if key not in SHARED_KEYS.get(name, ()) or not isinstance(value, str | int | float):
                    raise ValueError(f"{name}.{key} is no setting of drawing")
    settings.setdefault("model", {})["checkpoint"] = folder / EXPORT_NAME
    settings.setdefault("tokenizer", {})["checkpoint"] = folder / SHARED_TOKENIZER
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
