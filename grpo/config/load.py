"""From a recipe file and a command line to a recipe, or to every mistake in them at once."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tomli

from grpo.config.builder import RecipeBuilder, RecipeT
from grpo.config.flags import help_topics, split_arguments
from grpo.config.help import help_text
from grpo.config.recipes import job_named
from grpo.config.shipped import recipe_path


def load_recipe(recipe_class: type[RecipeT], argv: Sequence[str] | None = None) -> RecipeT:
    """The recipe that a command line asks for: flags over the file of `--config` over the defaults.

    `--help` prints every key and ends the program.

    Args:
        recipe_class: the job.
        argv: arguments without the program's name; None takes those of this process.

    Returns:
        The recipe, with `metrics.run_dir` filled in where the job has one.

    Raises:
        UserError: with one line for each mistake in the file, in the flags and in their combination.
    """
    arguments = sys.argv[1:] if argv is None else argv
    topics = help_topics(arguments)
    if topics is not None:
        print(help_text(recipe_class, topics))
        raise SystemExit(0)
    builder = RecipeBuilder(recipe_class)
    flags = split_arguments(arguments)
    config = next((flag.text for flag in flags if flag.name == "--config"), None)
    if config is not None:
        builder.read_file(config)
    return builder.build(flags, run_name=Path(config).stem if config else recipe_class.job)


def recipe_from_toml(recipe_class: type[RecipeT], text: str, *, origin: str = "recipe") -> RecipeT:
    """The recipe that a TOML text describes, such as the one that `Recipe.to_toml` wrote into a run.

    Args:
        recipe_class: the job.
        origin: where the text comes from, for the error lines.

    Raises:
        UserError: with one line for each mistake.
    """
    builder = RecipeBuilder(recipe_class)
    builder.read_text(text, origin, folder=Path())
    return builder.build()


def job_of_file(config: str) -> str | None:
    """The `job` of a recipe file; None where it says none or cannot be read, of which `load_recipe` tells why."""
    try:
        return job_named(tomli.loads(recipe_path(config).read_text(encoding="utf-8-sig")).get("job"))
    except (OSError, ValueError):  # of decoding text and TOML
        return None
