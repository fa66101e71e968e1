"""From a recipe file and a command line to a recipe, or to every mistake in them at once."""

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import tomli
from pydantic import ValidationError

from grpo.config.checks import Problem
from grpo.config.errors import UserError
from grpo.config.flags import parse_flags, reference_flags
from grpo.config.keys import recipe_keys
from grpo.config.recipes import RECIPES, WITHOUT_CHECKS, Recipe
from grpo.config.reference import help_text
from grpo.config.sections import LARGEST_INT, LARGEST_SEED

RecipeT = TypeVar("RecipeT", bound=Recipe)


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
    flags = parse_flags(recipe_class, sys.argv[1:] if argv is None else argv)
    if flags.help:
        print(help_text(recipe_class))
        raise SystemExit(0)
    builder = _RecipeBuilder(recipe_class, flags.problems, flags.suspects)
    if flags.config is not None:
        builder.read_file(flags.config)
    for given in flags.values:
        builder.take(_Setting(given.key, given.text, f"{given.flag} {given.text or '(empty)'}", from_file=False))
    builder.name_run(Path(flags.config).stem if flags.config else recipe_class.job)
    return builder.build()


def job_of_file(path: str) -> str | None:
    """The `job` of a recipe file; None where it says none or cannot be read, of which `load_recipe` tells why."""
    try:
        job = tomli.loads(Path(path).read_text(encoding="utf-8")).get("job")
    except (OSError, ValueError):  # of decoding text and TOML
        return None
    return job if job in tuple(RECIPES) else None


def recipe_from_toml(recipe_class: type[RecipeT], text: str, *, origin: str = "recipe") -> RecipeT:
    """The recipe that a TOML text describes, such as the one saved with a run.

    Args:
        recipe_class: the job.
        text: what `Recipe.to_toml` wrote, or a user.
        origin: where the text comes from, for the error lines.

    Raises:
        UserError: with one line for each mistake.
    """
    builder = _RecipeBuilder(recipe_class)
    builder.read_text(text, origin)
    return builder.build()


@dataclass(frozen=True)
class _Setting:
    """A value that the user gave.

    Args:
        key: `section.key`, which exists.
        value: text of a flag, or a typed value of a recipe file.
        origin: the flag with its text, or the name of the file.
        from_file: it stands in a recipe file.
    """

    key: str
    value: Any
    origin: str
    from_file: bool


class _RecipeBuilder(Generic[RecipeT]):
    """Gathers settings and mistakes; a later setting of the same key overrides an earlier one.

    A key that is wrong by itself is reported for that only: `_suspects` keeps it, and the key that a mistyped name
    probably meant, out of the checks across keys.
    """

    def __init__(self, recipe_class: type[RecipeT], problems: Iterable[str] = (), suspects: Iterable[str] = ()) -> None:
        self._recipe_class = recipe_class
        self._sections = recipe_class.sections()
        self._keys = recipe_keys(recipe_class)
        self._problems = list(problems)
        self._suspects = set(suspects)
        self._values: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, _Setting] = {}

    def read_file(self, path: str) -> None:
        """Take the settings of a recipe file."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            self._give_up(f"--config {path}: cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            self._give_up(f"{path}: is not a text file: {error}")
        else:
            self.read_text(text, path)

    def read_text(self, text: str, origin: str) -> None:
        """Take the settings of a TOML text."""
        try:
            table = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            self._give_up(f"{origin}: is not valid TOML: {error}")
            return
        own_job = self._recipe_class.job
        job = table.pop("job", own_job)
        if job not in tuple(RECIPES):
            self._give_up(f"{origin}: job must be one of {', '.join(RECIPES)}, not {_quoted(job)}")
        elif job != own_job:
            self._give_up(f"{origin}: is a recipe of recipes/{job}.py, not of recipes/{own_job}.py")
        else:
            for name, section in table.items():
                self._read_section(name, section, origin)

    def take(self, setting: _Setting) -> None:
        """Convert one value to the type of its key. Flags are text; a recipe file has types, which must be right."""
        key = self._keys[setting.key]
        _, _, name = key.name.partition(".")
        section = self._sections[key.section]
        try:
            if setting.value == "none" and key.is_optional:
                value = None
            elif setting.from_file:
                value = getattr(section.model_validate({name: setting.value}, strict=True), name)
            else:
                value = getattr(section.model_validate_strings({name: setting.value}), name)
        except ValidationError as error:
            typed = f", not {_quoted(setting.value)}" if setting.from_file else ""
            self._problems.append(f"{setting.origin}: {key.name} must be {key.allowed}{_broken_limit(error)}{typed}")
            self._suspects.add(key.name)
        else:
            self._values.setdefault(key.section, {})[name] = value
            self._sources[key.name] = setting

    def name_run(self, name: str) -> None:
        """Give a run without a folder its default one."""
        if "metrics" in self._sections:
            metrics = self._values.setdefault("metrics", {})
            metrics["run_dir"] = metrics.get("run_dir") or f"runs/{name}"

    def build(self) -> RecipeT:
        """The recipe, or one UserError with all mistakes."""
        recipe = self._recipe_class.model_validate(self._values, context=WITHOUT_CHECKS)
        problems = [problem for problem in recipe.problems() if self._suspects.isdisjoint(problem.keys)]
        self._problems += [self._combination_line(problem) for problem in problems]
        if self._problems:
            raise UserError(self._problems)
        return recipe

    def _give_up(self, line: str) -> None:
        """The whole file is lost, and any key may have been in it."""
        self._problems.append(line)
        self._suspects.update(self._keys)

    def _read_section(self, name: str, section: object, origin: str) -> None:
        if name not in self._sections or not isinstance(section, dict):
            self._problems.append(f"{origin}: {self._misplaced(name, section)}")
            return
        for key, value in section.items():
            full_name = f"{name}.{key}"
            if full_name in self._keys:
                self.take(_Setting(full_name, value, origin, from_file=True))
            else:
                nearest = _nearest_key(full_name, self._keys)
                self._suspects.update(nearest)
                self._problems.append(f"{origin}: {full_name}: unknown key{_did_you_mean(nearest)}")

    def _misplaced(self, name: str, value: object) -> str:
        """What is wrong with an entry outside of the known sections."""
        if name in self._sections:
            return f"{name}: is a section: write [{name}] and its keys below"
        if not isinstance(value, dict):
            return f"{name}: unknown key outside of the sections{_did_you_mean(_nearest_key(name, self._keys))}"
        nearest = difflib.get_close_matches(name, self._sections, n=1)
        self._suspects.update(key for key in self._keys if key.partition(".")[0] in nearest)
        hint = f"; did you mean [{nearest[0]}]?" if nearest else f"; there are {', '.join(self._sections)}"
        return f"[{name}]: unknown section{hint}"

    def _combination_line(self, problem: Problem) -> str:
        """The problem behind the flags and files that its keys come from."""
        origins = dict.fromkeys(self._sources[key].origin for key in problem.keys if key in self._sources)
        if origins:
            return f"{', '.join(origins)}: {problem.text}"
        key = problem.keys[0]
        flag = reference_flags(self._recipe_class).get(key, f"--{key}")
        return f"{problem.text}; set it by {flag} or in the recipe file"


def _nearest_key(name: str, keys: Iterable[str]) -> list[str]:
    """The key that was probably meant: one of the same name in another section, else the most similar one."""
    own_name = name.rpartition(".")[2]
    return [key for key in keys if key.endswith(f".{own_name}")][:1] or difflib.get_close_matches(name, keys, n=1)


def _did_you_mean(nearest: Sequence[str]) -> str:
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _broken_limit(error: ValidationError) -> str:
    """A limit that the description of a key does not name: the size of whole numbers, and that text is not empty."""
    (broken,) = [{**item.get("ctx", {}), "type": item["type"]} for item in error.errors()][:1]
    if broken["type"] == "less_than_equal" and broken["le"] in (LARGEST_INT, LARGEST_SEED):
        return f" and <= {broken['le']}"
    return ", but not empty" if broken["type"] == "string_too_short" else ""


def _quoted(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)
