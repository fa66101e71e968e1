"""Gathers the settings of a recipe and the mistakes in them."""

import difflib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import tomli
from pydantic import ValidationError

from grpo.config import reference_flags as reference
from grpo.config.errors import UserError
from grpo.config.flags import Flag
from grpo.config.keys import recipe_keys, section_keys
from grpo.config.recipes import FORMER_JOBS, FORMER_KEYS, RECIPES, WITHOUT_CHECKS, GRPORecipe, Recipe
from grpo.config.reward_kinds import reward_class
from grpo.config.reward_sections import REFERENCE_REWARD, RewardTable
from grpo.config.sections import LARGEST_INT, LARGEST_SEED, Section
from grpo.config.shipped import nearest_recipe, recipe_path

RecipeT = TypeVar("RecipeT", bound=Recipe)
CONFIG = "config"


class RecipeBuilder(Generic[RecipeT]):
    """Takes a file and flags, which override it, and builds the recipe or one error with all mistakes.

    A key that is wrong by itself is reported for that only: `_suspects` keeps it, and the key that a mistyped name
    probably meant, out of the checks across keys.
    """

    def __init__(self, recipe_class: type[RecipeT]) -> None:
        self._recipe_class = recipe_class
        self._is_grpo = issubclass(recipe_class, GRPORecipe)
        self._sections: dict[str, type[Section]] = dict(recipe_class.sections())
        self._keys = recipe_keys(recipe_class)
        self._flags = {f"--{key}": key for key in (CONFIG, *self._keys)}
        if self._is_grpo:  # elsewhere the names of the reference trainer's flags would mislead
            for title, section in reference.SECTIONS.items():
                self._keys |= section_keys(title, section)
            self._flags |= reference.ALL_FLAGS
        self._file: dict[str, Any] = {}
        self._origin, self._folder = "", Path()
        self._kinds: dict[str, str] = {}  # of the tables [reward.NAME]
        self._tables_of_file: Collection[str] = ()
        self._values: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, str] = {}
        self._problems: list[str] = []
        self._suspects: set[str] = set()

    def read_file(self, config: str) -> None:
        """Read a recipe file."""
        path = recipe_path(config)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            nearest = nearest_recipe(config)
            hint = f"; did you mean the shipped recipe {nearest}?" if nearest else ""
            self._give_up(f"--config {config}: cannot be read: {error.strerror}{hint}")
        except UnicodeDecodeError as error:
            self._give_up(f"{config}: is not a text file: {error}")
        else:
            self.read_text(text, str(path), path.parent)

    def read_text(self, text: str, origin: str, folder: Path) -> None:
        """Read a TOML text that stands in a file of this folder."""
        self._origin, self._folder = origin, folder
        try:
            file = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            self._give_up(f"{origin}: is not valid TOML: {error}")
            return
        own_job = self._recipe_class.job
        job = file.pop("job", own_job)
        job = FORMER_JOBS.get(str(job), job)
        if job not in tuple(RECIPES):
            self._give_up(f"{origin}: job must be one of {', '.join(RECIPES)}, not {_quoted(job)}")
        elif job != own_job:
            self._give_up(f"{origin}: is a recipe of `grpo {job}`, not of `grpo {own_job}`")
        else:
            self._file = file

    def build(self, flags: Sequence[Flag] = (), *, run_name: str | None = None) -> RecipeT:
        """The recipe of the file and these flags, or one UserError with all mistakes.

        Args:
            run_name: what a run without a folder of its own is called.
        """
        if self._is_grpo:
            self._find_rewards(flags)
        settings = self._name_flags(flags)
        for name, section in self._file.items():
            self._read_section(name, section)
        for key, text, origin in settings:
            self._take(key, text, origin, is_text=True)
        values = self._values
        if self._is_grpo:
            self._translate(flags)
            values.setdefault("reward", {})["tables"] = self._build_rewards()
        if run_name and "metrics" in self._sections:
            metrics = values.setdefault("metrics", {})
            metrics["run_dir"] = metrics.get("run_dir") or f"runs/{run_name}"
        sections = {name: section for name, section in values.items() if name in self._recipe_class.model_fields}
        recipe = self._recipe_class.model_validate(sections, context=WITHOUT_CHECKS)
        for problem in recipe.problems():
            self._report_combination(problem.keys, problem.text)
        if self._problems:
            raise UserError(self._problems)
        return recipe

    def _give_up(self, line: str) -> None:
        """The whole file is lost, and any key may have been in it."""
        self._problems.append(line)
        self._suspects |= {CONFIG}

    def _name_flags(self, flags: Sequence[Flag]) -> list[tuple[str, str, str]]:
        """Key, text and origin of the flags; a line for each that is unknown, lacks its value or was given twice."""
        settings, seen = [], {}
        broken = tuple(f"--reward.{name}." for name in self._kinds if f"reward.{name}" not in self._sections)
        for flag in flags:
            key = self._key_of(flag.name)
            if key is None:
                if not flag.name.startswith(broken):
                    self._problems.append(self._unknown_flag(flag.name))
                continue
            if key in seen:
                self._problems.append(f"{flag.name}: {key} is already set by {seen[key]}; give one of them")
            elif flag.text is None and not (key in self._keys and self._keys[key].is_switch):
                missing = f"a value is missing (write {flag.name}=VALUE if it begins with a minus)"
                self._problems.append(f"{flag.name}: {missing}")
                self._suspects.add(key)
            elif key != CONFIG:
                text = "true" if flag.text is None else flag.text
                settings.append((key, text, f"{flag.name} {text or '(empty)'}"))
            seen.setdefault(key, flag.name)
        return settings

    def _key_of(self, flag: str) -> str | None:
        """The key that a flag sets; in a table of free keys, [reward.NAME.arguments], it may be any."""
        parent = flag.removeprefix("--").rpartition(".")[0]
        if parent in self._keys and self._keys[parent].is_table:
            return flag.removeprefix("--")
        return self._flags.get(flag)

    def _unknown_flag(self, flag: str) -> str:
        if not flag.startswith("-"):
            return f"{flag}: unexpected argument; settings are given as --section.key VALUE"
        former = self._former(flag.removeprefix("--"))
        if former:
            return f"{flag}: unknown flag; {former}"
        nearest = difflib.get_close_matches(flag, self._flags, n=1)
        self._suspects.update(self._flags[match] for match in nearest)
        return f"{flag}: unknown flag{_did_you_mean(nearest)}"

    def _former(self, key: str) -> str | None:
        """What became of a key of former versions."""
        former = FORMER_KEYS.get(key)
        if former:
            self._suspects.update(["reward"] if key.startswith("reward.") else former.split()[:1])
        return former

    def _read_section(self, name: str, section: object, *, parent: str = "") -> None:
        """Take the keys of a section of the file, and of its tables where it is [reward]."""
        title = parent + name
        if title not in self._sections or not isinstance(section, dict):
            self._problems.append(f"{self._origin}: {self._misplaced(title, section)}")
            return
        for key, value in section.items():
            full_name = f"{title}.{key}"
            if full_name in self._keys:
                self._take(full_name, value, self._origin)
            elif full_name in self._sections and isinstance(value, dict):
                self._read_section(key, value, parent=f"{title}.")
            elif not (title == "reward" and key in self._kinds and isinstance(value, dict)):  # of an unknown kind
                self._problems.append(f"{self._origin}: {full_name}: unknown key{self._hint(full_name)}")

    def _hint(self, key: str) -> str:
        """What was probably meant: one of the same name in another section, else the most similar one."""
        former = self._former(key)
        if former:
            return f"; {former}"
        own_name = key.rpartition(".")[2]
        keys = [name for name in self._keys if name.partition(".")[0] not in reference.SECTIONS]
        same = [name for name in keys if name.endswith(f".{own_name}")]
        nearest = same[:1] or difflib.get_close_matches(key, keys, n=1)
        self._suspects.update(nearest)
        return _did_you_mean(nearest)

    def _misplaced(self, name: str, value: object) -> str:
        """What is wrong with an entry outside of the known sections."""
        if name in self._sections:
            return f"{name}: is a section: write [{name}] and its keys below"
        if not isinstance(value, dict):
            return f"{name}: unknown key outside of the sections{self._hint(name)}"
        sections = self._recipe_class.sections()
        nearest = difflib.get_close_matches(name, sections, n=1)
        self._suspects.update(key for key in self._keys if key.partition(".")[0] in nearest)
        hint = f"; did you mean [{nearest[0]}]?" if nearest else f"; there are {', '.join(sections)}"
        return f"[{name}]: unknown section{hint}"

    def _take(self, name: str, value: Any, origin: str, *, is_text: bool = False) -> None:
        """Convert one value to the type of its key. Flags are text; a recipe file has types, which must be right."""
        if name not in self._keys:  # a flag for an entry of a table of free keys
            table, _, entry = name.rpartition(".")
            section, _, own_name = table.rpartition(".")
            values = self._values.setdefault(section, {})
            values[own_name] = {**values.get(own_name, {}), entry: _free_value(value)}
            return
        key = self._keys[name]
        try:
            given = None if value == "none" and key.is_optional else key.convert(value, is_text=is_text)
        except ValidationError as error:
            typed = "" if is_text else f", not {_quoted(value)}"
            subject = "" if key.section in reference.SECTIONS else f"{name} "
            self._problems.append(f"{origin}: {subject}must be {key.allowed}{_broken_limit(error)}{typed}")
            self._suspects.add(name)
            return
        if given is not None and key.is_path:
            given = os.path.abspath(given if is_text else self._folder / given)
        self._values.setdefault(key.section, {})[key.name] = given
        self._sources[name] = origin

    def _find_rewards(self, flags: Sequence[Flag]) -> None:
        """Learn the keys of the tables [reward.NAME] of the file, of the flags and of the reference trainer."""
        section = self._file.get("reward")
        entries = section.items() if isinstance(section, dict) else ()
        own = self._sections["reward"].model_fields
        tables = {name: table for name, table in entries if name not in own and isinstance(table, dict)}
        self._tables_of_file, origins = tables.keys(), dict.fromkeys(tables, self._origin)
        self._kinds = {name: table.get("kind", name) for name, table in tables.items()}
        for flag in flags:
            part, name, *key = [*reference.REFERENCE_FLAGS.get(flag.name, flag.name[2:]).split("."), ""][:3]
            if part == "reward" and any(key):
                origins.setdefault(name, flag.name)
                kind = flag.text if key == ["kind"] else None
                self._kinds[name] = kind or self._kinds.get(name, name)
        if not any(origin not in reference.REFERENCE_FLAGS for origin in origins.values()):
            self._kinds.setdefault(REFERENCE_REWARD, REFERENCE_REWARD)
        for name, kind in self._kinds.items():
            try:
                settings = reward_class(str(kind)).Settings
            except UserError as error:
                self._problems.append(f"{origins.get(name, self._origin)}: reward.{name}: {error}")
                self._suspects.add("reward")
                continue
            self._sections[f"reward.{name}"] = settings
            keys = section_keys(f"reward.{name}", settings)
            self._keys |= keys
            self._flags |= {f"--{key}": key for key in keys}

    def _build_rewards(self) -> dict[str, RewardTable]:
        """The tables that are right, with what their files say."""
        tables = {}
        for name, kind in self._kinds.items():
            title = f"reward.{name}"
            values = {"kind": kind, **self._values.get(title, {})}
            try:
                if title in self._sections:
                    tables[name] = self._sections[title].model_validate(values).resolved()
            except UserError as error:
                self._problems += [f"{title}: {line}" for line in error.problems]
            except ValidationError as error:
                for item in error.errors():
                    key = ".".join([title, *map(str, item["loc"])])
                    is_missing = item["type"] == "missing"
                    self._report_combination((key,), f"{key} is required" if is_missing else f"{key}: {item['msg']}")
        self._suspects |= {"reward"} if len(tables) < len(self._kinds) else set()
        return tables

    def _translate(self, flags: Sequence[Flag]) -> None:
        """Turn what the flags of the reference trainer mean into keys of a recipe."""
        used = {flag.name: str(flag) for flag in flags if flag.name in reference.ALL_FLAGS}
        values = {f"{title}.{name}": value for title, keys in self._values.items() for name, value in keys.items()}
        step = [flag for flag in used if flag in reference.STEP_FLAGS]
        if step and any(flag.name == "--training.batch_size" for flag in flags):
            key = "training.batch_size"
            self._problems.append(f"--{key}: {key} is already set by {step[0]}; give one of them")
        elif not used.keys().isdisjoint(reference.BATCH_DEFAULTS) or (used and not self._origin):
            for key, (number, names) in reference.whole_batch(values, used.keys()).items():
                origin = ", ".join(used.get(flag, f"{flag} {default}") for flag, default in names.items())
                self._take(key, number, origin)
        if not self._suspects.isdisjoint(reference.STEP_FLAGS.values()):
            self._suspects.add("training.batch_size")
        is_on = values.get(reference.EMBEDDING_SWITCH, "embedding_cosine" in self._tables_of_file)
        if not is_on and "reward.embedding_cosine" in self._sections and "--reward-embedcos-weight" in used:
            self._values["reward.embedding_cosine"]["weight"] = 0.0
        for name, default in reference.Unavailable().model_dump().items():
            if values.get(f"unavailable.{name}", default) != default:
                origin = self._sources[f"unavailable.{name}"]
                self._problems.append(f"{origin}: this reward is not available yet; leave the flag out")

    def _report_combination(self, keys: Sequence[str], text: str) -> None:
        """The problem behind the flags and files that its keys come from."""
        if CONFIG in self._suspects or not self._suspects.isdisjoint(keys):
            return
        origins = dict.fromkeys(self._sources[key] for key in keys if key in self._sources)
        if origins:
            self._problems.append(f"{', '.join(origins)}: {text}")
            return
        flags = {key: flag for flag, key in self._flags.items()}  # the reference's own name of it, where there is one
        flag = flags.get(keys[0], "--reward.NAME.weight")
        self._problems.append(f"{text}; set it by {flag} or in the recipe file")


def _did_you_mean(nearest: Sequence[str]) -> str:
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _broken_limit(error: ValidationError) -> str:
    """A limit that the description of a key does not name: the size of whole numbers, and that text is not empty."""
    broken = error.errors()[0]
    limit = broken.get("ctx", {}).get("le")
    if broken["type"] == "less_than_equal" and limit in (LARGEST_INT, LARGEST_SEED):
        return f" and <= {limit}"
    return ", but not empty" if broken["type"] == "string_too_short" else ""


def _free_value(text: str) -> Any:
    """What a flag gives to a table of free keys: a TOML value, or else text."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def _quoted(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)
