"""Gathers the settings of a recipe and the mistakes in them."""

import difflib
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import tomli
from pydantic import ValidationError

from grpo.config import reference_flags as reference
from grpo.config.errors import UserError, did_you_mean
from grpo.config.keys import Key, section_keys
from grpo.config.recipe import Recipe, TrainingRecipe
from grpo.config.recipes import GRPORecipe
from grpo.config.registry import RECIPES, job_named
from grpo.config.rewards import REFERENCE_REWARD, RewardTable, reward_class
from grpo.config.types import Section
from grpo.config.user_files import reason
from grpo.config.values import MOST_KEYS, broken_limit, free_value, quoted, require_modest

RecipeT = TypeVar("RecipeT", bound=Recipe)
CONFIG = "config"
Flag = tuple[str, str | None]  # --name, and the text after it if there is one


class RecipeBuilder(Generic[RecipeT]):
    """Takes a file and flags, which override it, and builds the recipe or one error with all mistakes.

    A key that is wrong by itself is reported for that only: `_suspects` keeps it, and the key or section that a
    mistyped name probably meant, out of the checks across keys.

    Args:
        resolves: look at the files that rewards depend on; not for a recipe of the past.
    """

    def __init__(self, recipe_class: type[RecipeT], *, resolves: bool = True) -> None:
        self._recipe_class, self._resolves = recipe_class, resolves
        self._is_grpo = issubclass(recipe_class, GRPORecipe)
        self._sections: dict[str, type[Section]] = recipe_class.sections()
        self._lost_tables: set[str] = set()  # [reward.NAME] of an unknown kind
        self._keys: dict[str, Key] = {}
        self._flags: dict[str, str] = {}  # -> their keys
        self._file: dict[str, Any] = {}
        self._origin, self._folder = "", Path()
        self._values: dict[str, Any] = {}  # by the full name of the key, as are their sources
        self._sources: dict[str, str] = {}
        self._selects_text = False
        self._problems: list[str] = []
        self._suspects: set[str] = set()

    def read(self, text: str, origin: str, folder: Path) -> None:
        """Read a TOML text that stands in a file of this folder."""
        self._origin, self._folder = origin, folder
        try:
            file = tomli.loads(text)
            require_modest(file)
        except (ValueError, RecursionError, MemoryError) as error:  # numbers and nestings beyond Python's limits too
            self.give_up(f"{origin}: is not valid TOML: {reason(error)}")
            return
        own_job = self._recipe_class.job
        given = file.pop("job", own_job)
        job = job_named(given)
        if job is None:
            self.give_up(f"{origin}: job must be one of {', '.join(RECIPES)}, not {quoted(given)}")
        elif job != own_job:
            self.give_up(f"{origin}: is a recipe of `grpo {job}`, not of `grpo {own_job}`")
        else:
            self._file = file

    def give_up(self, line: str) -> None:
        """The whole file is lost, and any key may have been in it."""
        self._problems.append(line)
        self._suspects.add(CONFIG)

    def keys_of_flags(self, flags: Sequence[Flag]) -> dict[str, Key]:
        """What is known of every flag that these flags and the file give a meaning to; not of a table's free keys."""
        if len(flags) > MOST_KEYS:
            raise UserError(f"the command line has {len(flags)} flags: a recipe has at most {MOST_KEYS} keys")
        if self._is_grpo:
            self._selects_text = any(_selects_text(*flag) for flag in flags)
            self._find_rewards(flags)
        self._keys = section_keys(self._sections)
        self._flags = {f"--{key}": key for key in (CONFIG, *self._keys)}
        if self._is_grpo:  # elsewhere the names of the reference trainer's flags would mislead
            self._keys |= section_keys(reference.SECTIONS)
            self._flags |= reference.ALL_FLAGS
        return {flag: self._keys[key] for flag, key in self._flags.items() if key in self._keys}

    def build(
        self,
        flags: Sequence[Flag] = (),
        *,
        run_name: str | None = None,
        needs_files: bool = False,
        ranks: int | None = None,
    ) -> RecipeT:
        """The recipe of the file and these flags, or one UserError; a run without a folder of its own gets a name.

        The reference's flags count on each of `ranks` processes; None is as many as a launcher has started.
        """
        self.keys_of_flags(flags)
        settings = self._name_flags(flags)
        for name, section in self._file.items():
            self._read_section(name, section)
        for key, text, origin in settings:
            self._take(key, text, origin, is_text=True)
        if self._is_grpo:
            self._translate(ranks or _launched_ranks())
        if run_name and "metrics" in self._sections:
            self._values["metrics.run_dir"] = self._values.get("metrics.run_dir") or f"runs/{run_name}"
        values: dict[str, dict[str, Any]] = {}
        for key, value in self._values.items():
            section, _, name = key.rpartition(".")
            values.setdefault(section, {})[name] = value
        if self._is_grpo:
            values["reward"] = {**values.get("reward", {}), **self._build_rewards(values)}
        own = self._recipe_class.sections().items()
        sections: dict[str, Any]
        sections = {name: section.model_validate(values[name]) for name, section in own if name in values}
        recipe = self._recipe_class.model_construct(**sections)
        for problem in recipe.problems():
            self._report_combination(problem, re.findall(r"[a-z]\w*(?:\.[\w-]+)+", problem))
        read = {f"--{CONFIG}": self._origin} if self._origin else {}
        for line in (*recipe.missing_files(), *recipe.overwritten_inputs(read)) if needs_files else ():
            self._report_combination(line, [line.partition(":")[0]])
        if self._problems:
            raise UserError(self._problems)
        return recipe

    def _name_flags(self, flags: Sequence[Flag]) -> list[tuple[str, str, str]]:
        """Key, text and origin of the flags; a line for each that is unknown, lacks its value or was given twice."""
        settings: list[tuple[str, str, str]] = []
        seen: dict[str, str] = {}
        for flag, given in flags:
            name = flag.removeprefix("--")
            table = name.rpartition(".")[0]
            if name.startswith(tuple(f"{title}." for title in self._lost_tables)):
                continue
            is_free = table in self._keys and self._keys[table].is_table
            key = name if is_free else self._flags.get(flag)
            problem = ""
            if not flag.startswith("-"):
                problem = "unexpected argument; settings are given as --section.key VALUE"
            elif key is None:
                problem = f"unknown flag{self._hint(name, flag)}"
            elif key in seen:
                twice = flag == seen[key]
                problem = "given twice" if twice else f"{key} is already set by {seen[key]}; give one of them"
            elif key not in self._keys and key != CONFIG and not is_free:
                problem = f"{key}: the kind of that reward has no such key"
            elif given is None and not (key in self._keys and self._keys[key].field.annotation is bool):
                problem = f"a value is missing (write {flag}=VALUE if it begins with a minus)"
                self._suspects.add(key)
            elif key != CONFIG:
                text = "true" if given is None else given
                settings.append((key, text, f"{flag} {text or '(empty)'}"))
            if problem:
                self._problems.append(f"{flag}: {problem}")
            if key is not None:
                seen.setdefault(key, flag)
        return settings

    def _read_section(self, title: str, section: object) -> None:
        """Take the keys of a section of the file, and of its tables where it is [reward]."""
        if title in self._sections and isinstance(section, dict):
            for name, value in section.items():
                key = f"{title}.{name}"
                if key in self._keys:
                    self._take(key, value, self._origin)
                elif key in self._sections and isinstance(value, dict):
                    self._read_section(key, value)
                elif key not in self._lost_tables:
                    self._problems.append(f"{self._origin}: {key}: unknown key{self._hint(key)}")
            return
        if title in self._sections:
            problem = f"{title}: is a section: write [{title}] and its keys below"
        elif isinstance(section, dict):
            sections = self._recipe_class.sections()
            self._suspects.update(difflib.get_close_matches(title, sections, n=1))
            problem = f"[{title}]: unknown section; {did_you_mean(title, sections)}"
        else:
            problem = f"{title}: unknown key outside of the sections{self._hint(title)}"
        self._problems.append(f"{self._origin}: {problem}")

    def _hint(self, key: str, flag: str = "") -> str:
        """Which key or flag an unknown one probably meant."""
        if flag:
            nearest = difflib.get_close_matches(flag, self._flags, n=1)
        else:
            names = [name for name, known in self._keys.items() if known.section not in reference.SECTIONS]
            same = [name for name in names if name.endswith(f".{key.rpartition('.')[2]}")]  # in another section
            nearest = same[:1] or difflib.get_close_matches(key, names, n=1)
        self._suspects.update(self._flags.get(name, name) for name in nearest)
        return f"; did you mean {nearest[0]}?" if nearest else ""

    def _take(self, name: str, value: Any, origin: str, *, is_text: bool = False) -> None:
        """Convert one value to the type of its key. Flags are text; a recipe file has types, which must be right."""
        if name not in self._keys:  # a flag for an entry of a table of free keys
            table, _, entry = name.rpartition(".")
            self._values[table] = {**self._values.get(table, {}), entry: free_value(value)}
            return
        key = self._keys[name]
        try:
            given = None if value == "none" and key.is_optional else key.convert(value, is_text=is_text)
        except ValidationError as error:
            typed = "" if is_text else f", not {quoted(value)}"
            subject = "" if key.section in reference.SECTIONS else f"{name} "
            several = self._several_runs(key, value) if is_text else ""
            self._problems.append(f"{origin}: {subject}must be {key.allowed}{broken_limit(error)}{typed}{several}")
            self._suspects.add(name)
            return
        if "\0" in (given if isinstance(given, str) else ""):
            self._problems.append(f"{origin}: {name} must be text without NUL characters")
            self._suspects.add(name)
            return
        if given is not None and key.is_path:
            given = os.path.abspath(given if is_text else self._folder / given)
        self._values[name], self._sources[name] = given, origin

    def _several_runs(self, key: Key, text: str) -> str:
        """The command for a flag that gives several right values where a run takes one."""
        if not issubclass(self._recipe_class, TrainingRecipe) or "," not in text:
            return ""
        try:
            for part in text.split(","):
                key.convert(part, is_text=True)
        except ValidationError:
            return ""
        return f"; one run for each: grpo sweep {self._recipe_class.job}, with the same flags"

    def _find_rewards(self, flags: Sequence[Flag]) -> None:
        """Learn the kinds of the tables [reward.NAME] of the file, of the flags and of the reference trainer."""
        section = self._file.get("reward")
        entries = section.items() if isinstance(section, dict) else ()
        own_keys = self._sections["reward"].model_fields
        tables = {name: table for name, table in entries if isinstance(table, dict) and name not in own_keys}
        kinds = {name: table.get("kind", name) for name, table in tables.items()}
        origins = dict.fromkeys(tables, self._origin)
        for flag, text in flags:
            key = reference.REFERENCE_FLAGS.get(flag, flag.removeprefix("--"))
            if flag in reference.SWITCHES and (text or "true").lower() not in ("false", "0", "no", "off", "f", "n"):
                key = f"reward.{reference.SWITCHES[flag][0]}.weight"
            match = re.fullmatch(r"reward\.([^.]+)\.(.+)", key)
            if match and match[1] not in own_keys:
                name, own_key = match.groups()
                origins.setdefault(name, flag)
                kind = text if own_key == "kind" else None
                kinds[name] = kind or kinds.get(name, name)
        if all(origin in reference.ALL_FLAGS for origin in origins.values()):
            kinds.setdefault(REFERENCE_REWARD, REFERENCE_REWARD)
            if self._is_text_command:
                kinds.setdefault("lpips", "lpips")
        for name, kind in kinds.items():
            title, origin = f"reward.{name}", origins.get(name, self._origin)
            try:
                if not re.fullmatch(r"[\w-]+", name, re.ASCII):
                    raise UserError("a reward's name has letters, digits, _ and - only")
                self._sections[title] = reward_class(str(kind)).Settings
                self._values[f"{title}.kind"], self._sources[f"{title}.kind"] = kind, origin
            except UserError as error:
                hint = f"; give {title}.kind" if kind == name and not str(error).endswith("?") else ""
                self._problems.append(f"{origin}: {title}: {error}{hint}")
                self._suspects.add("reward.NAME")
                self._lost_tables.add(title)

    def _build_rewards(self, values: Mapping[str, Mapping[str, Any]]) -> dict[str, RewardTable]:
        """The tables that are right, with what their files say."""
        tables = {}
        titles = [title for title in self._sections if title.startswith("reward.")]
        for title in titles:
            try:
                table = cast(type[RewardTable], self._sections[title]).model_validate(values[title])
                tables[title.removeprefix("reward.")] = table.resolved() if self._resolves else table
            except UserError as error:
                self._problems += [f"{title}: {line}" for line in error.problems]
            except ValidationError as error:
                for item in error.errors():
                    key = ".".join([title, *map(str, item["loc"])])
                    is_missing = item["type"] == "missing"
                    self._report_combination(
                        f"{key} is required" if is_missing else f"{key}: {item['msg'].removeprefix('Value error, ')}",
                        [key],
                    )
        if len(tables) < len(titles):
            self._suspects.add("reward.NAME")
        return tables

    @property
    def _is_text_command(self) -> bool:
        """Whether this is a command line of the reference's text-to-image trainer, without a recipe file."""
        return self._selects_text and not self._origin

    def _translate(self, ranks: int) -> None:
        """Set what flags of the reference mean beyond their own keys; its batches count on each process."""
        if self._values.get("training.dropout_mode", "eval") != "eval":
            for key in ("model.dropout", "model.class_dropout"):
                self._values.setdefault(key, reference.DROPOUT_RATE)
        if self._selects_text:
            defaults = {**reference.TEXT_MODEL, **(reference.TEXT_COMMAND if self._is_text_command else {})}
            for key, value in defaults.items():
                self._values.setdefault(key, value)
        used = {origin.partition(" ")[0]: origin for origin in self._sources.values()}  # every flag -> with its text
        is_its_command = not self._origin and not used.keys().isdisjoint(reference.ALL_FLAGS)
        if is_its_command or any(flag in used for flags in reference.BATCH_FLAGS.values() for flag in flags):
            for key, batch_flags in reference.BATCH_FLAGS.items():
                own_keys = {flag: reference.ALL_FLAGS[flag] for flag in batch_flags}
                given = [flag for flag in batch_flags if flag in used]
                if not self._suspects.isdisjoint(own_keys.values()):
                    self._suspects.add(key)
                elif given and self._sources.get(key, "").startswith(f"--{key} "):
                    self._problems.append(f"--{key}: {key} is already set by {given[0]}; give one of them")
                elif given or key not in self._values:
                    numbers = [self._values.get(own_keys[flag], default) for flag, default in batch_flags.items()]
                    origins = [used.get(flag, f"{flag} {default}") for flag, default in batch_flags.items()]
                    self._take(key, math.prod(numbers) * ranks, ", ".join(origins))
        for switch, (name, default) in reference.SWITCHES.items():
            self._switch(switch, f"reward.{name}", default=default, used=used.keys())

    def _switch(self, flag: str, title: str, *, default: float, used: Collection[str]) -> None:
        """Switch a reward off that only flags of the reference give keys to, or whose switch is off by name."""
        weight, is_on = f"{title}.weight", self._values.get(reference.ALL_FLAGS[flag])
        if title not in self._sections:
            return
        if is_on:
            self._values.setdefault(weight, default)
        by_flags = any(other in used for other, key in reference.REFERENCE_FLAGS.items() if key.startswith(f"{title}."))
        has_own = self._sources[f"{title}.kind"] == self._origin or self._sources.get(weight, "").startswith(
            "--reward."
        )
        if is_on is False or (is_on is None and by_flags and not has_own):
            self._values[weight] = 0.0

    def _report_combination(self, text: str, keys: Sequence[str]) -> None:
        """The problem behind the flags and files that its keys come from."""
        if CONFIG in self._suspects or any(key.startswith(tuple(self._suspects)) for key in keys):
            return
        origins = dict.fromkeys(self._sources[key] for key in keys if key in self._sources)
        if origins:
            self._problems.append(f"{', '.join(origins)}: {text}")
            return
        flags = {key: flag for flag, key in self._flags.items()}  # the reference's own name of it, where there is one
        flag = flags.get(keys[0], "--reward.NAME.weight")
        self._problems.append(f"{text}; set it by {flag} or in the recipe file")


def _launched_ranks() -> int:
    ranks = os.environ.get("WORLD_SIZE", "1")
    return int(ranks[:9]) if ranks.isdecimal() else 1  # a wrong one is told when the ranks meet


def _selects_text(flag: str, text: str | None) -> bool:
    """Whether a flag of the reference trainer means a text-conditional model."""
    return flag in reference.TEXT_FLAGS or (flag == "--cls-token-num" and text is not None and text not in ("0", "1"))
