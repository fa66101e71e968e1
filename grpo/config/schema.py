"""JSON Schema (draft 2020-12) of the recipes, by which editors complete and check TOML files."""

from typing import Any

from pydantic.json_schema import models_json_schema

from grpo.config.registry import RECIPES
from grpo.config.rewards import Rewards, reward_class, reward_kinds


def recipe_schema(job: str) -> dict[str, Any]:
    """What a recipe file of a job may contain, key by key; how keys combine is checked by `load_recipe` alone.

    Args:
        job: a key of `RECIPES`.
    """
    schema = RECIPES[job].model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["job"] = {"const": job, "description": "What `grpo` does with this recipe."}
    if Rewards.__name__ in schema["$defs"]:
        _add_reward_tables(schema["$defs"])
    for table in (schema, *schema["$defs"].values()):
        table.pop("required", None)  # a flag may give what the file leaves out
    _say_none(schema)
    return schema


def _say_none(part: Any) -> None:
    """TOML has no null: a recipe says "none"."""
    if isinstance(part, dict):
        if part.get("type") == "null":
            del part["type"]
            part["const"] = "none"
        if part.get("default", 0) is None:
            part["default"] = "none"
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            _say_none(item)


def _add_reward_tables(definitions: dict[str, Any]) -> None:
    """The tables [reward.NAME]: of the kind that is their name, or else of that which `kind` says."""
    classes = {kind: reward_class(kind).Settings for kind in sorted(reward_kinds())}
    places, tables = models_json_schema([(settings, "validation") for settings in {*classes.values()}])
    definitions |= tables["$defs"]
    kinds = {}
    for kind, settings in classes.items():
        table = definitions[places[settings, "validation"]["$ref"].rpartition("/")[2]]
        definitions[f"reward.{kind}"] = {**table, "properties": {**table["properties"], "kind": {"const": kind}}}
        kinds[kind] = {"$ref": f"#/$defs/reward.{kind}"}
    chosen = {
        "type": "object",
        "properties": {"kind": {"enum": [*kinds]}},
        "required": ["kind"],
        "allOf": [{"if": {"properties": {"kind": {"const": kind}}}, "then": kinds[kind]} for kind in kinds],
    }
    rewards = definitions[Rewards.__name__]
    named = {kind: {"if": {"required": ["kind"]}, "then": chosen, "else": kinds[kind]} for kind in kinds}
    rewards["properties"] |= named
    rewards["additionalProperties"] = chosen
