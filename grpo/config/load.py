"""From a recipe file and a command line to a recipe, or to every mistake in them at once."""

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tomli
from pydantic import ValidationError

from grpo.config.checks import Problem
from grpo.config.errors import UserError
from grpo.config.flags import parse_flags, reference_flags
from grpo.config.keys import Key, recipe_keys
from grpo.config.recipes import WITHOUT_CHECKS, Recipe

RecipeT = TypeVar("RecipeT", bound=Recipe)


@dataclass(frozen=True)
class Setting:
    """A value that the user gave.

    Args:
        key: `section.key`, which exists.
        value: as typed: text of a flag, or a value of the recipe file.
        origin: the flag with its text, or the name of the file.
        from_file: it stands in the recipe file.
    """

    key: str
    value: Any
    origin: str
    from_file: bool


class InvalidValue(Exception):
    """A value that its key does not take."""


def load_recipe(recipe_class: type[RecipeT], argv: Sequence[str] | None = None) -> RecipeT:
    """The recipe that a command line asks for: flags over the file of `--config` over the defaults.

    Args:
        recipe_class: the job.
        argv: arguments without the program's name; None takes those of this process.

    Returns:
        The recipe, with `metrics.run_dir` filled in where the job has one.

    Raises:
        UserError: with one line for each mistake in the file, in the flags and in their combination.
    """
    flags = parse_flags(recipe_class, sys.argv[1:] if argv is None else argv)
    keys = recipe_keys(recipe_class)
    problems, suspects, settings = list(flags.problems), set(), []
    if flags.config is not None:
        settings, file_problems, suspects = _read_file(recipe_class, keys, flags.config)
        problems += file_problems
    for given in flags.values:
        settings.append(Setting(given.key, given.text, f"{given.flag} {given.text}", from_file=False))

    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, Setting] = {}
    for setting in settings:
        section, _, name = setting.key.partition(".")
        try:
            values.setdefault(section, {})[name] = _convert(recipe_class, keys[setting.key], setting)
            sources[setting.key] = setting
        except InvalidValue as error:
            problems.append(str(error))
            suspects.add(setting.key)
    if "metrics.run_dir" in keys and "metrics.run_dir" not in suspects:
        name = Path(flags.config).stem if flags.config else recipe_class.job
        values.setdefault("metrics", {}).setdefault("run_dir", f"runs/{name}")

    recipe = recipe_class.model_validate(values, context=WITHOUT_CHECKS)
    reference = reference_flags(recipe_class)
    for problem in recipe.problems():
        if suspects.isdisjoint(problem.keys):  # a key that is wrong by itself is reported once, for that
            problems.append(_combination_line(problem, sources, reference))
    if problems:
        raise UserError(problems)
    return recipe


def _read_file(recipe_class: type[Recipe], keys: Iterable[str], path: str) -> tuple[list[Setting], list[str], set[str]]:
    """Settings of a recipe file, a line for each name that does not exist, and the keys that were probably meant."""
    try:
        table = tomli.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid TOML: {error}") from error
    job = table.pop("job", recipe_class.job)
    if job != recipe_class.job:
        raise UserError(f'{path}: is a recipe of recipes/{job}.py (job = "{job}"), not of {recipe_class.job}')
    sections = recipe_class.sections()
    settings, problems, suspects = [], [], set()
    for name, section in table.items():
        if name not in sections or not isinstance(section, dict):
            problems.append(f"{path}: {_unknown_section(name, section, keys, sections)}")
            continue
        for key, value in section.items():
            full_name = f"{name}.{key}"
            if full_name in keys:
                settings.append(Setting(full_name, value, path, from_file=True))
            else:
                nearest = _nearest_key(full_name, keys)
                suspects.update(nearest)
                problems.append(f"{path}: {full_name}: unknown key{_did_you_mean(nearest)}")
    return settings, problems, suspects


def _convert(recipe_class: type[Recipe], key: Key, setting: Setting) -> Any:
    """The value in the type of its key. Flags are text; a recipe file has types, which must be right."""
    if setting.value == "none" and key.is_optional:
        return None
    section_name, _, name = key.name.partition(".")
    section = recipe_class.sections()[section_name]
    try:
        if setting.from_file:
            return getattr(section.model_validate({name: setting.value}, strict=True), name)
        return getattr(section.model_validate_strings({name: setting.value}), name)
    except ValidationError as error:
        line = f"{setting.origin}: {key.name} must be {key.allowed}"
        if setting.from_file:
            line += f", not {json.dumps(setting.value, default=str, ensure_ascii=False)}"
        raise InvalidValue(line) from error


def _combination_line(problem: Problem, sources: dict[str, Setting], reference: dict[str, str]) -> str:
    """The problem behind the flags and files that its keys come from."""
    origins = dict.fromkeys(sources[key].origin for key in problem.keys if key in sources)
    if origins:
        return f"{', '.join(origins)}: {problem.text}"
    key = problem.keys[0]
    return f"{problem.text}; set it by {reference.get(key, f'--{key}')} or in the recipe file"


def _unknown_section(name: str, value: object, keys: Iterable[str], sections: Iterable[str]) -> str:
    if name in sections:
        return f"{name}: is a section: write [{name}] and its keys below"
    if not isinstance(value, dict):
        return f"{name}: unknown key outside of the sections{_did_you_mean(_nearest_key(name, keys))}"
    nearest = difflib.get_close_matches(name, sections, n=1)
    return f"[{name}]: unknown section" + (
        _did_you_mean([f"[{match}]" for match in nearest]) or f"; there are {', '.join(sections)}"
    )


def _nearest_key(name: str, keys: Iterable[str]) -> list[str]:
    """The key that was probably meant: one of the same name in another section, else the most similar one."""
    own_name = name.rpartition(".")[2]
    return [key for key in keys if key.endswith(f".{own_name}")][:1] or difflib.get_close_matches(name, keys, n=1)


def _did_you_mean(nearest: Sequence[str]) -> str:
    return f"; did you mean {nearest[0]}?" if nearest else ""
