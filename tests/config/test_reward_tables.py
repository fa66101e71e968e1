"""Tables [reward.NAME]: typed by their kind, from a file and from flags."""

import re
import sys
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import Field

from grpo.config import (
    REWARD_KINDS,
    GRPORecipe,
    RewardTable,
    UserError,
    changes_that_matter,
    load_recipe,
    recipe_from_toml,
    reward_class,
)

MINIMAL = ["--data.name", "synthetic"]


class Stub:
    """A reward of these tests."""

    needs = frozenset({"real_images"})

    class Settings(RewardTable):
        """Its table."""

        path_keys = frozenset({"function"})

        function: str
        """FILE:NAME."""
        radius: int = 1
        """A number."""
        is_sharp: bool = False
        """A switch."""
        arguments: dict[str, Any] = Field(default_factory=dict)
        """Free keys."""

        def resolved(self) -> Self:
            if "absent" in self.function:
                raise UserError("function: is absent")
            return self.model_copy(update={"radius": self.radius * 10 if self.radius < 10 else self.radius})


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARD_KINDS, "stub", f"{__name__}:Stub")


@pytest.fixture
def recipe_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "experiment.toml"
        path.write_text(f'[data]\nname = "synthetic"\n{text}')
        return str(path)

    return write


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(GRPORecipe, argv)
    return caught.value.problems


def test_default_is_the_reference_reward() -> None:
    (table,) = load_recipe(GRPORecipe, MINIMAL).reward.active.values()
    assert (table.kind, table.weight, table.distance) == ("reconstruction", 1.0, "l2")
    assert GRPORecipe.model_validate({"data": {"name": "synthetic"}}).reward.tables == {"reconstruction": table}


def test_tables_of_a_file_and_flags(recipe_file, tmp_path: Path) -> None:
    path = recipe_file(
        "[reward]\nbatch_size = 3\n"
        "[reward.reconstruction]\nweight = 2\n"
        '[reward.sharp]\nkind = "stub"\nfunction = "mine.py:sharp"\n[reward.sharp.arguments]\nsize = 3\nname = "x"\n'
    )
    flags = ["--reward.sharp.arguments.size", "4", "--reward.sharp.is_sharp", "--reward.soft.kind", "stub"]
    flags += ["--reward.soft.function=other.py:f", "--reward.reconstruction.weight", "-1"]
    recipe = load_recipe(GRPORecipe, ["--config", path, *flags])
    tables = recipe.reward.tables
    assert list(tables) == ["reconstruction", "sharp", "soft"]
    assert tables["reconstruction"].weight == -1
    assert tables["sharp"] == Stub.Settings(
        kind="stub",
        function=str(tmp_path / "mine.py:sharp"),
        radius=10,
        is_sharp=True,
        arguments={"size": 4, "name": "x"},
    )
    assert tables["soft"].function == str(Path("other.py:f").absolute())
    assert recipe.reward.batch_size == 3
    saved = recipe.to_toml()
    assert '[reward.sharp.arguments]\nsize = 4\nname = "x"\n' in saved
    assert recipe_from_toml(GRPORecipe, saved) == recipe


def test_a_table_by_flags_alone_replaces_the_default() -> None:
    assert list(load_recipe(GRPORecipe, [*MINIMAL, "--reward.embedding_cosine.weight", "2"]).reward.tables) == [
        "embedding_cosine"
    ]
    by_reference = load_recipe(GRPORecipe, [*MINIMAL, "--reward-rec-type", "l1"]).reward.tables
    assert by_reference["reconstruction"].distance == "l1"


def test_all_mistakes_of_tables_are_reported_with_the_others(recipe_file) -> None:
    path = recipe_file(
        "[reward.reconstruction]\nwieght = 2\ndistance = 'l3'\n"
        "[reward.sharp]\nkind = 'stub'\narguments = 3\n"
        "[reward.blunt]\nkind = 'stub'\nfunction = 'absent.py:f'\n"
        "[reward.embedding_cosin]\nweight = 3\n"
        "[optimizer]\nlr = 'x'\n"
    )
    argv = ["--config", path, "--reward.blunt.radius", "x", "--reward.embedding_cosin.weight", "1"]
    assert problems_of(*argv) == [
        f'{path}: reward.embedding_cosin: unknown kind of reward "embedding_cosin"; did you mean embedding_cosine?',
        f"{path}: reward.reconstruction.wieght: unknown key; did you mean reward.reconstruction.weight?",
        f'{path}: reward.reconstruction.distance must be one of l1, l2, not "l3"',
        f"{path}: reward.sharp.arguments must be a table, not 3",
        f'{path}: optimizer.lr must be a number >= 0, not "x"',
        "--reward.blunt.radius x: reward.blunt.radius must be a whole number",
        "reward.sharp.function is required; set it by --reward.sharp.function or in the recipe file",
        "reward.blunt: function: is absent",
    ]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--reward.reconstruction.wight", "1"],
            "--reward.reconstruction.wight: unknown flag; did you mean --reward.reconstruction.weight?",
        ),
        (
            ["--reward.recon.weight", "1"],
            '--reward.recon.weight: reward.recon: unknown kind of reward "recon"; did you mean reconstruction?',
        ),
        (
            ["--reward.dark.function", "dark.py:darkness"],
            '--reward.dark.function: reward.dark: unknown kind of reward "dark"; there are '
            f"{', '.join([*REWARD_KINDS, 'stub'])}; give reward.dark.kind",
        ),
        (
            ["--reward.reconstruction_weight", "1"],
            "--reward.reconstruction_weight: unknown flag; did you mean --reward.reconstruction.weight?",
        ),
        (
            ["--rollout.mode", "autoregressive"],
            "--rollout.mode autoregressive: reward.reconstruction.weight must be 0 with rollout.mode = "
            '"autoregressive": a free sample has no real image to match',
        ),
        (
            ["--reward.reconstruction.weight", "0"],
            "no reward is on: give a table [reward.NAME] a weight other than 0; set it by --reward.NAME.weight or in "
            "the recipe file",
        ),
        (
            ["--reward.s.kind", "stub"],
            "reward.s.function is required; set it by --reward.s.function or in the recipe file",
        ),
    ],
)
def test_one_line_for_a_mistake(argv: list[str], line: str) -> None:
    assert problems_of(*MINIMAL, *argv) == [line]


def test_kinds_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of the group `grpo.rewards` is a kind; one that cannot be imported says so when it is used."""
    metadata = tmp_path / "others-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[grpo.rewards]\nloud = others_rewards:Loud\ngone = not_there:Gone\n")
    (tmp_path / "others_rewards.py").write_text("class Loud:\n    pass\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert reward_class("loud").__name__ == "Loud"
    with pytest.raises(UserError, match='"gone" cannot be imported from not_there:Gone: No module named'):
        reward_class("gone")


def test_every_key_of_a_kind_is_documented() -> None:
    for kind in REWARD_KINDS:
        assert all(field.description for field in reward_class(kind).Settings.model_fields.values()), kind


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--reward.batch_size.kind", "jpeg_size"], "--reward.batch_size.kind: unknown flag"),
        (
            ["--reward.reconstruction.kind", "jpeg_size", "--reward-rec-type", "l1"],
            "the kind of that reward has no such",
        ),
        (["--reward.a b.kind", "jpeg_size"], "a reward's name has letters, digits"),
        (["--rollout.temperature", "1e-300"], "rollout.temperature must be a number >= 1e-30"),
        (["--config", "a" * 300], "cannot be read"),
        (["--metrics.run_dir", "\udcff"], "not UTF-8"),
    ],
)
def test_flags_that_once_ended_in_a_traceback(flags: list[str], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        load_recipe(GRPORecipe, ["--data.name", "synthetic", *flags])


@pytest.mark.parametrize("text", ["reward.x = " + "[" * 2000 + "]" * 2000, "seed = " + "9" * 5000])
def test_files_beyond_pythons_limits_are_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text(text)
    with pytest.raises(UserError, match="is not valid TOML"):
        load_recipe(GRPORecipe, ["--config", str(tmp_path / "deep.toml")])


def test_a_batch_that_is_left_out_is_the_one_that_it_stands_for() -> None:
    flags = ["--data.name", "synthetic", "--rollout.batch_size", "4", "--rollout.num_generations", "4"]
    before, after = (load_recipe(GRPORecipe, [*flags, *more]) for more in ([], ["--training.batch_size", "16"]))
    assert changes_that_matter(before, after) == []
    assert changes_that_matter(before, load_recipe(GRPORecipe, [*flags, "--training.batch_size", "8"])) != []


def test_a_reward_over_a_population_takes_the_whole_rollout_before_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores are known only then, so no sampling forward waits for the backward."""
    recipe = load_recipe(GRPORecipe, ["--data.name", "synthetic", "--rollout.batch_size", "16"])
    assert recipe.schedule(ranks=2).trains_sampling_forward
    monkeypatch.setattr(reward_class("reconstruction"), "needs", frozenset({"population"}))
    schedule = recipe.schedule(ranks=2)
    assert not schedule.trains_sampling_forward
    assert schedule.images_per_part == schedule.images == 8


def test_statistics_of_all_rewards_take_the_whole_rollout_before_the_update() -> None:
    def waits(*flags: str) -> bool:
        return not load_recipe(GRPORecipe, [*MINIMAL, *flags]).schedule(ranks=1).trains_sampling_forward

    assert not waits("--reward.reconstruction.normalise", "group")
    assert waits("--reward.reconstruction.normalise", "batch")


def test_a_group_of_one_has_no_statistics() -> None:
    alone = ["--rollout.num_generations", "1", "--objective.advantage", "batch_std"]
    load_recipe(GRPORecipe, [*MINIMAL, *alone, "--reward.reconstruction.normalise", "batch"])
    with pytest.raises(UserError, match=r"at least 2 with reward\.reconstruction\.normalise = \"group\""):
        load_recipe(GRPORecipe, [*MINIMAL, *alone, "--reward.reconstruction.normalise", "group"])


def test_the_page_of_rewards_lists_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    table = page.partition("## The kinds")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(REWARD_KINDS.keys() - {"stub"})
