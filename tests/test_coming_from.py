"""The tables of docs/coming_from.md: every key on the right is ours, and every flag of the reference is there."""

import re
from pathlib import Path

import pytest

from grpo.config import RECIPES
from grpo.config.keys import section_keys
from grpo.config.reference_flags import ALL_FLAGS, SECTIONS
from grpo.config.rewards import REWARD_KINDS, reward_class

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text(encoding="utf-8")


def rows(title: str) -> list[list[str]]:
    """The cells of the table of a section, without its head."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def keys() -> set[str]:
    sections = {name: part for recipe in RECIPES.values() for name, part in recipe.sections().items()}
    tables = {f"reward.{kind}": reward_class(kind).Settings for kind in REWARD_KINDS}
    return set(map(str, section_keys({**sections, **tables}).values()))


def test_every_flag_of_the_reference_stands_beside_its_key() -> None:
    told = {flag.strip("`"): key for flag, key in rows("From the reference trainer (VA-π)")}
    assert told.keys() == ALL_FLAGS.keys()
    for flag, key in ALL_FLAGS.items():
        section = key.partition(".")[0]
        assert section in SECTIONS or f"`{key}`" in told[flag], flag


@pytest.mark.parametrize("title", ["From TRL", "From torchtitan"])
def test_every_key_on_the_right_is_one(title: str, keys: set[str]) -> None:
    table = rows(title)
    assert len(table) > 30
    for theirs, ours, note in table:
        named = re.findall(r"`([a-z_0-9.]+)`", ours)
        assert all(key in keys for key in named), (theirs, ours)
        assert named or note, theirs
