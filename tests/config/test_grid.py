"""Which runs a command line with several values stands for, and what they are called."""

import pytest

from grpo.config import GRPORecipe, PretrainRecipe, UserError, load_recipe, variants, with_keys

DEBUG = ("--config", "debug")


def names(*arguments, recipe=GRPORecipe):
    return [variant.name for variant in variants(recipe, [*DEBUG, *arguments])]


def test_every_combination_is_a_run_and_the_last_flag_changes_fastest():
    flags = ("--optimizer.lr", "1e-5, 3e-5", "--training.steps=2", "--training.seed", "0,1")
    found = variants(GRPORecipe, [*DEBUG, *flags])
    assert [run.name for run in found] == ["lr=1e-05,seed=0", "lr=1e-05,seed=1", "lr=3e-05,seed=0", "lr=3e-05,seed=1"]
    recipe = load_recipe(GRPORecipe, found[2].arguments)
    assert (recipe.optimizer.lr, recipe.training.seed, recipe.training.steps) == (3e-5, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--training.seed", "3"], [""]),
        (["--training.seed", "3", "--training.seed", "4"], ["seed=3", "seed=4"]),
        (["--compile.enabled", "--compile.enabled=false"], ["enabled=true", "enabled=false"]),
        (["--training.batch_size", "none,8"], ["batch_size=none", "batch_size=8"]),
        (["--lr", "1e-5,3e-5"], ["lr=1e-05", "lr=3e-05"]),  # the reference trainer's name of it
        (["--data.classes", "1,2"], [""]),
        (["--data.classes", "1,2", "--data.classes", "all"], ["classes=1+2", "classes=all"]),
        (["--metrics.run_dir", "a,b", "--ckpt-dir", "c,d"], [""]),
        (["--reward.a.kind", "jpeg_size", "--reward.a.weight", "-1,1"], ["a.weight=-1.0", "a.weight=1.0"]),
        (["--rollout.temperature", "1,2", "--data.image_size", "1,x"],
         ["temperature=1.0,image_size=1", "temperature=1.0,image_size=x", "temperature=2.0,image_size=1",
          "temperature=2.0,image_size=x"]),
    ],
)  # fmt: skip
def test_values_and_names(arguments, found):
    assert names(*arguments) == found


def test_keys_of_one_name_are_named_in_full():
    assert names("--data.name", "synthetic,classes", "--model.name", "GPT-tiny,GPT-B")[0] == (
        "data.name=synthetic,model.name=GPT-tiny"
    )


def test_free_keys_of_a_reward_take_lists_as_toml_has_them():
    reward = ("--reward.mine.kind", "python", "--reward.mine.function", "a.py:f")
    assert names(*reward, "--reward.mine.arguments.radius", "1,2") == [
        "mine.arguments.radius=1",
        "mine.arguments.radius=2",
    ]
    assert names(*reward, "--reward.mine.arguments.radii", "[1,2]") == [""]


def test_names_are_those_of_folders():
    assert names("--model.checkpoint", "../a/x.pt,/b/x y.pt") == ["checkpoint=..-a-x.pt", "checkpoint=-b-x-y.pt"]
    alike = names("--model.checkpoint", "a/x,a-x")
    assert len({*alike}) == 2
    assert all(name.startswith("checkpoint=a-x-") for name in alike)
    long = names("--model.checkpoint", f"{'x' * 300}1,{'x' * 300}2")
    assert len({*long}) == 2
    assert max(map(len, long)) < 200


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--optimizer.lr", "1e-5,0.00001"], "--optimizer.lr: 1e-05 is given 2 times"),
        (["--training.seed", ",".join(map(str, range(1001)))], "1001 runs: a sweep has at most 1000"),
        (["--training.seed", "0,1", "--training.seed", "2", "--training.seed", "2"], "2 is given 2 times"),
    ],
)
def test_grids_that_are_no_sweep(arguments, problem):
    with pytest.raises(UserError, match=problem):
        names(*arguments)


def test_mistakes_stay_in_the_command_lines():
    """For the recipe to tell: unknown keys, values that are wrong, flags without one, files given twice."""
    arguments = ["--training.sed", "1,2", "--training.seed", "0,", "--config", "debug", "--optimizer.lr"]
    first, second = variants(GRPORecipe, [*DEBUG, *arguments])
    with pytest.raises(UserError) as caught:
        load_recipe(GRPORecipe, second.arguments)
    told = str(caught.value)
    assert "--training.sed: unknown flag" in told
    assert "--config: given twice" in told
    assert "--optimizer.lr: a value is missing" in told
    assert "--training.seed (empty): training.seed must be a whole number" in told
    assert first.name == "seed=0"


def test_keys_are_set_in_the_place_of_their_flags():
    arguments = ["--ckpt-dir", "a", "--metrics.run_dir=b", "--lr", "1e-5"]
    changed = with_keys(GRPORecipe, arguments, {"checkpoint.dir": "-c", "metrics.run_dir": "d"})
    assert changed == ["--lr", "1e-5", "--checkpoint.dir=-c", "--metrics.run_dir", "d"]


@pytest.mark.parametrize(
    ("recipe", "arguments", "told"),
    [
        (GRPORecipe, ["--training.seed", "0,1,2"], "one run for each: grpo sweep train, with the same flags"),
        (PretrainRecipe, ["--optimizer.lr", "1e-5,3e-5"], "one run for each: grpo sweep pretrain,"),
        (GRPORecipe, ["--training.seed", "0,x"], None),
        (GRPORecipe, ["--training.seed", "x"], None),
    ],
)
def test_a_single_run_with_several_values_tells_the_command(recipe, arguments, told):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, arguments)
    assert ("grpo sweep" in str(caught.value)) == (told is not None)
    assert (told or "") in str(caught.value)
