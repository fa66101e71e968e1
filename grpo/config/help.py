"""The reference of all keys: `--help` of a job, and the page docs/configuration.md for all jobs."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from grpo.config import reference_flags as reference
from grpo.config.errors import UserError, did_you_mean
from grpo.config.keys import Key, section_keys
from grpo.config.recipe import Recipe
from grpo.config.recipes import GRPORecipe
from grpo.config.registry import RECIPES
from grpo.config.rewards import REWARD_KINDS, reward_class, reward_kinds
from grpo.config.types import Section

FLAG_OF_KEY = {key: flag for flag, key in reference.ALL_FLAGS.items()}


def help_text(recipe_class: type[Recipe], topics: Sequence[str] = ()) -> str:
    """The keys of a job by section, with their flags, the values they take, their defaults and their meaning.

    Args:
        topics: sections to show; none are all of them. Only where `reward` is asked for are the rewards imported,
            to tell the keys of each kind, or `reward.KIND`, to tell those of one.

    Raises:
        UserError: there is no such section.
    """
    sections = recipe_class.sections()
    kinds: list[str] = [*reward_kinds()] if topics and "reward" in sections else []
    titles = [*sections, *(f"reward.{kind}" for kind in kinds)]
    for topic in topics:
        if topic not in titles:
            raise UserError(f"--help {topic}: no section of this job; {did_you_mean(topic, titles)}")
    draws = "sampling" in sections
    source = "[RUN | --config NAME]" if draws else "[--config NAME]"
    usage_of_run = ["RUN: folder of a run, or of `grpo share`, whose generator is used."] if draws else []
    lines = [
        recipe_class.__doc__ or "",
        "",
        f"usage: grpo {recipe_class.job} {source} [--section.key VALUE ...]",
        *usage_of_run,
        "A flag overrides the recipe file, the file overrides the default. --help SECTION shows that section only.",
    ]
    is_grpo = recipe_class is GRPORecipe
    wanted = topics or sections
    shown = {
        name: section for name, section in sections.items() if name in {title.partition(".")[0] for title in wanted}
    }
    kinds = [kind for kind in kinds if {"reward", f"reward.{kind}"} & {*wanted}]
    for title, meaning, keys in _parts(shown, kinds):
        if title == "reward" and title not in wanted:
            continue
        lines += ["", f"[{title}] {meaning}", *_described(keys, with_reference=is_grpo)]
        if title == "reward" and not topics:
            lines += [f"  --reward.NAME.key  (kinds: {', '.join(reward_kinds())}; --help reward tells their keys)"]
    if is_grpo and not topics:
        lines += ["", "Flags of the reference trainer besides those above"]
        lines += [f"  {flag}  (sets {key})" for flag, key in reference.REFERENCE_FLAGS.items() if key.count(".") > 1]
        for _, meaning, keys in _parts(reference.SECTIONS):
            lines += ["", meaning, *_described(keys, with_reference=True)]
    return "\n".join(lines)


def markdown() -> str:
    """The tables of docs/configuration.md."""
    lines = ["## Jobs", "", "| job | what it does | sections |", "|---|---|---|"]
    sections: dict[str, type[Section]] = {}
    for job, recipe_class in RECIPES.items():
        names = " ".join(f"`[{name}]`" for name in recipe_class.sections())
        lines.append(f"| `grpo {job}` | {recipe_class.__doc__} | {names} |")
        sections |= recipe_class.sections()
    others = "`grpo quickstart`, `grpo sweep`, `grpo compare`, `grpo memory` and `grpo doctor`"
    lines += ["", f"{others} have no recipe of their own; `--help` tells their flags."]
    for title, meaning, keys in _parts(sections, REWARD_KINDS):
        lines += ["", f"##{'#' * title.count('.')} [{title}]", "", meaning, *_table(keys)]
    lines += ["", "## Flags of the reference trainer that are no keys"]
    for _, meaning, keys in _parts(reference.SECTIONS):
        lines += ["", meaning, *_table(keys)]
    return "\n".join(lines) + "\n"


def _parts(
    sections: Mapping[str, type[Section]], kinds: Iterable[str] = ()
) -> Iterator[tuple[str, str, Iterable[Key]]]:
    """Title, meaning and keys of the sections, and of the table of each kind of reward behind [reward]."""
    for name, section in sections.items():
        yield name, _first_paragraph(section), section_keys({name: section}).values()
        for kind in kinds if name == "reward" else ():
            keys = section_keys({f"reward.{kind}": reward_class(kind).Settings}).values()
            own = [key for key in keys if key.name != "kind"]  # which the name of the table says
            yield f"reward.{kind}", _first_paragraph(reward_class(kind)), own


def _described(keys: Iterable[Key], *, with_reference: bool) -> Iterator[str]:
    for key in keys:
        flags = ", ".join(_names(key, prefix="--", with_reference=with_reference))
        yield f"  {flags}  ({key.allowed}; {f'default {key.default}' if key.default else 'required'})"
        yield from textwrap.wrap(key.meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _table(keys: Iterable[Key]) -> Iterator[str]:
    yield from ("", "| key | values | default | meaning |", "|---|---|---|---|")
    for key in keys:
        names = "<br>".join(f"`{name}`" for name in _names(key))
        default = f"`{_one_line(key.default)}`" if key.default else "required"
        yield f"| {names} | {key.allowed} | {default} | {key.meaning.replace('|', '&#124;')} |"


def _one_line(value: str) -> str:
    """A list of TOML, which is written over several lines, as a cell of a table can hold it."""
    return " ".join(value.split()).replace("[ ", "[").replace(", ]", "]")


def _names(key: Key, *, prefix: str = "", with_reference: bool = True) -> list[str]:
    """The key, if a recipe has it, and the flag of the reference trainer that sets it."""
    own = [f"{prefix}{key}"] if key.section not in reference.SECTIONS else []
    return own + ([FLAG_OF_KEY[str(key)]] if with_reference and str(key) in FLAG_OF_KEY else [])


def _first_paragraph(documented: type) -> str:
    return " ".join((documented.__doc__ or "").partition("\n\n")[0].split())
