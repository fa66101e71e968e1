"""The recipes that come with the project."""

import difflib
from pathlib import Path

SHIPPED_RECIPES = Path(__file__).parents[1] / "train_configs"


def recipe_path(config: str) -> Path:
    """The file that `--config` names: a path, else a shipped recipe by its name, such as quickstart/grpo."""
    candidates = (Path(config), SHIPPED_RECIPES / config, SHIPPED_RECIPES / f"{config}.toml")
    return next((path for path in candidates if path.is_file()), candidates[0])


def nearest_recipe(config: str) -> str | None:
    """The shipped recipe whose name is most like this one."""
    names = [file.relative_to(SHIPPED_RECIPES).with_suffix("").as_posix() for file in SHIPPED_RECIPES.glob("**/*.toml")]
    return next(iter(difflib.get_close_matches(config, names, n=1)), None)
