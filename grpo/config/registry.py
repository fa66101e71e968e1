"""The recipe class of each job."""

from collections.abc import Mapping

from grpo.config.drawing_recipes import ConvertRecipe, EvaluateRecipe, GenerateRecipe
from grpo.config.judging_recipes import ClassifierRecipe, ReaderRecipe
from grpo.config.recipe import Recipe
from grpo.config.recipes import (
    EncodeRecipe,
    GRPORecipe,
    PretrainRecipe,
    TokenizerRecipe,
)
from grpo.config.sharing_recipes import DemoRecipe, ShareRecipe
from grpo.config.text_recipe import EncodeTextRecipe
from grpo.config.tuning_recipes import DistillRecipe, FinetuneRecipe

_ALL = (
    GRPORecipe, PretrainRecipe, DistillRecipe, FinetuneRecipe, TokenizerRecipe, ClassifierRecipe, ReaderRecipe,
    EncodeRecipe, EncodeTextRecipe, GenerateRecipe, EvaluateRecipe, ConvertRecipe, ShareRecipe,
    DemoRecipe,
)  # fmt: skip
RECIPES: Mapping[str, type[Recipe]] = {recipe.job: recipe for recipe in _ALL}
"""Recipe class of each job."""

FORMER_JOBS = {"grpo": "train", "train_tokenizer": "tokenizer", "train_classifier": "classifier"}
"""What files of former versions call a job."""


def job_named(word: object) -> str | None:
    """The job that a recipe file calls so; None where there is none."""
    job = FORMER_JOBS.get(str(word), str(word))
    return job if job in RECIPES else None
