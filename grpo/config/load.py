"""From a recipe file and a command line to a recipe, or to every mistake in them at once."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tomli

from grpo.config.builder import Flag, RecipeBuilder, RecipeT
from grpo.config.errors import UserError
from grpo.config.help import help_text
from grpo.config.registry import job_named
from grpo.config.user_files import read_text, reason, shorten

SHIPPED_RECIPES = Path(__file__).parents[1] / "train_configs"
"""The recipes that come with the project."""

LARGEST_RECIPE = 2**20  # bytes


def load_recipe(
    recipe_class: type[RecipeT],
    argv: Sequence[str] | None = None,
    *,
    needs_files: bool = False,
    ranks: int | None = None,
) -> RecipeT:
    """The recipe that a command line asks for: flags over the file of `--config` over the defaults.

    `--help` prints every key and ends the program.

    Args:
        argv: arguments without the program's name; None takes those of this process.
        needs_files: the job starts now, so every file and folder that the recipe names must be there.
        ranks: processes that the reference trainer's flags count on; None is as many as a launcher has started.

    Returns:
        The recipe, with `metrics.run_dir` filled in where the job has one.

    Raises:
        UserError: with one line for each mistake in the file, in the flags and in their combination.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        "".join(arguments).encode()
    except UnicodeEncodeError as error:
        raise UserError("the command line has bytes that are not UTF-8 text") from error
    topics = help_topics(arguments)
    if topics is not None:
        print(help_text(recipe_class, topics))
        raise SystemExit(0)
    flags = split_arguments(arguments)
    config = config_of(flags)
    name = Path(config).stem if config else recipe_class.job
    return recipe_builder(recipe_class, config).build(flags, run_name=name, needs_files=needs_files, ranks=ranks)


def config_of(flags: Sequence[Flag]) -> str | None:
    """What `--config` names."""
    return next((text for name, text in flags if name == "--config"), None)


def recipe_builder(recipe_class: type[RecipeT], config: str | None) -> RecipeBuilder[RecipeT]:
    """A builder that has read the file of `--config`, or keeps for its error why it cannot be read."""
    builder = RecipeBuilder(recipe_class)
    if config is not None:
        try:
            path = _recipe_path(config)
            builder.read(read_text(path, largest=LARGEST_RECIPE), str(path), path.parent)
        except UnicodeDecodeError as error:
            builder.give_up(f"{config}: is not a text file: {error}")
        except (OSError, ValueError, MemoryError) as error:
            builder.give_up(f"--config {shorten(config)}: cannot be read: {reason(error)}{_hint(config)}")
    return builder


def recipe_from_toml(recipe_class: type[RecipeT], text: str, *, origin: str = "recipe") -> RecipeT:
    """The recipe that `Recipe.to_toml` wrote into a run. The files that it names are not looked at.

    Args:
        origin: where the text comes from, for the error lines.

    Raises:
        UserError: with one line for each mistake.
    """
    builder = RecipeBuilder(recipe_class, resolves=False)
    builder.read(text, origin, folder=Path())
    return builder.build()


def job_of_file(config: str) -> str | None:
    """The `job` of a recipe file; None where it says none or cannot be read, of which `load_recipe` tells why."""
    try:
        return job_named(tomli.loads(read_text(_recipe_path(config), largest=LARGEST_RECIPE)).get("job"))
    except (OSError, ValueError, RecursionError, MemoryError):  # of decoding text and TOML
        return None


def shipped_recipe(name: str | None = None) -> str:
    """The text of a recipe that comes with the project, to copy and change; without a name, the names of all.

    Raises a UserError: there is none of that name.
    """
    if name is None:
        return "\n".join(_shipped_names())
    path = _recipe_path(name).resolve()
    if not path.is_file() or not path.is_relative_to(SHIPPED_RECIPES.resolve()):
        raise UserError(f"{name}: is no shipped recipe{_hint(name)}; `grpo recipes` lists them")
    return path.read_text(encoding="utf-8").rstrip("\n")


def help_topics(arguments: Sequence[str]) -> list[str] | None:
    """The words after `--help` or `-h`; None where no help is asked for."""
    asked = [place for place, word in enumerate(arguments) if word in ("--help", "-h")]
    return [word for word in arguments[asked[0] + 1 :] if not word.startswith("-")] if asked else None


def split_arguments(arguments: Sequence[str]) -> list[Flag]:
    """The flags of a command line; the word after one is its value unless it begins with a minus and is no number.

    A word that is no flag and no flag's value is kept as one, so that mistakes are told in their order.
    """
    flags: list[Flag] = []
    for word in arguments:
        if re.match(r"-(?![\d.])", word):
            name, equals, text = word.partition("=")
            flags.append((name, text if equals else None))
        elif flags and flags[-1][0].startswith("-") and flags[-1][1] is None:
            flags[-1] = (flags[-1][0], word)
        else:
            flags.append((word, None))
    return flags


def _recipe_path(config: str) -> Path:
    """The file that `--config` names: a path, else a shipped recipe by its name, such as quickstart/grpo.

    The folder of a shipped recipe may be left out where no other has one of the same name.
    """
    candidates = (Path(config), SHIPPED_RECIPES / config, SHIPPED_RECIPES / f"{config}.toml")
    namesakes = [path for path in SHIPPED_RECIPES.glob("*/*.toml") if path.stem == config]
    found = next((path for path in candidates if os.path.isfile(path)), candidates[0])
    return namesakes[0] if not os.path.isfile(found) and len(namesakes) == 1 else found


def _shipped_names() -> list[str]:
    return sorted(
        file.relative_to(SHIPPED_RECIPES).with_suffix("").as_posix() for file in SHIPPED_RECIPES.glob("**/*.toml")
    )


def _hint(config: str) -> str:
    nearest = difflib.get_close_matches(config, _shipped_names(), n=1)
    return f"; did you mean the shipped recipe {nearest[0]}?" if nearest else ""
