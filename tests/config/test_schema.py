"""The JSON Schema of the recipes accepts what the project ships and finds what a user mistypes."""

import copy
from pathlib import Path

import pytest
import tomli
from jsonschema import Draft202012Validator

from grpo.config import RECIPES, SHIPPED_RECIPES, job_of_file
from grpo.config.schema import recipe_schema

SHIPPED = sorted(path for path in SHIPPED_RECIPES.resolve().rglob("*.toml") if job_of_file(str(path)) in RECIPES)
SCHEMAS = {job: Draft202012Validator(recipe_schema(job)) for job in RECIPES}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_follow_the_schema(path: Path) -> None:
    errors = SCHEMAS[job_of_file(str(path))].iter_errors(tomli.loads(path.read_text()))
    assert [error.message for error in errors] == []


@pytest.mark.parametrize("job", RECIPES)
def test_it_is_a_schema_and_a_resolved_recipe_follows_it(job: str) -> None:
    Draft202012Validator.check_schema(recipe_schema(job))
    if job == "train":
        recipe = RECIPES[job].model_validate({"data": {"name": "synthetic"}})
        assert not list(SCHEMAS[job].iter_errors(tomli.loads(recipe.to_toml())))


RIGHT = {"job": "train", "reward": {"clip": {"weight": 1.0}, "sharp": {"kind": "jpeg_size"}}}
WRONG = {
    "an unknown section": {"modle": {}},
    "an unknown key": {"model": {"nam": "GPT-B"}},
    "a wrong type": {"training": {"steps": "many"}},
    "a value out of range": {"rollout": {"temperature": 0}},
    "another job": {"job": "pretrain"},
    "an unknown kind of reward": {"reward": {"sharp": {"kind": "sharpness"}}},
    "a reward without its kind": {"reward": {"sharp": {"weight": 1.0}}},
    "an unknown key of a kind": {"reward": {"clip": {"wieght": 1.0}}},
    "an unknown key of a table of another name": {"reward": {"sharp": {"kind": "jpeg_size", "sharpness": 1}}},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_mistakes_are_found(change: dict) -> None:
    assert SCHEMAS["train"].is_valid(RIGHT)
    recipe = copy.deepcopy(RIGHT)
    recipe |= change
    assert not SCHEMAS["train"].is_valid(recipe)
