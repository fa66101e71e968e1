"""Recipes: typed sections from TOML and flags. Only this package knows of TOML and of the command line."""

from grpo.config.drawing_recipes import ConvertRecipe, EvaluateRecipe, GenerateRecipe
from grpo.config.errors import TransientError, UserError, did_you_mean, import_extra, printable
from grpo.config.grid import variants, with_keys
from grpo.config.help import help_text
from grpo.config.job_sections import (
    Classifier,
    Convert,
    Distill,
    Encode,
    Evaluation,
    Finetune,
    Judge,
    Output,
    Sampling,
    TokenizerLoss,
)
from grpo.config.judging_recipes import ClassifierRecipe, ReaderRecipe
from grpo.config.load import SHIPPED_RECIPES, help_topics, job_of_file, load_recipe, recipe_from_toml, shipped_recipe
from grpo.config.policy_sections import Objective, Rollout
from grpo.config.recipe import (
    ADAPTER_NAMES,
    AVERAGE_NAME,
    EXPORT_NAME,
    Recipe,
    TrainingRecipe,
    changes_that_matter,
    differences,
)
from grpo.config.recipes import (
    EncodeRecipe,
    GeneratorRecipe,
    GRPORecipe,
    PretrainRecipe,
    TokenizerRecipe,
)
from grpo.config.registry import RECIPES
from grpo.config.rewards import REWARD_KINDS, Rewards, RewardTable, reward_class
from grpo.config.run_folder import DRAWN_ALIKE, SHARED_RECIPE, SHARED_TOKENIZER, of_run, shared_recipe
from grpo.config.schedule import Schedule
from grpo.config.sections import (
    ActivationCheckpoint,
    Checkpoint,
    Compile,
    Data,
    Debug,
    Lora,
    Metrics,
    Model,
    Optimizer,
    Parallel,
    Tokenizer,
    Training,
)
from grpo.config.sharing_recipes import DemoRecipe, Share, ShareRecipe
from grpo.config.text_recipe import EncodeTextRecipe
from grpo.config.text_sections import EncodeText, Text
from grpo.config.tuning_recipes import DistillRecipe, FinetuneRecipe
from grpo.config.types import Section, exists, is_url
from grpo.config.user_files import (
    innermost,
    read_bytes,
    read_text,
    reading,
    reason,
    require_regular,
    shorten,
    text_lines,
    writing,
)
