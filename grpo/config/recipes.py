"""The recipe of each job: its sections, and what belongs to the recipe as a whole.

A recipe object is always valid: every key by its section, every combination by the checks of its job.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

from grpo.config import checks, notes
from grpo.config.checks import Problem
from grpo.config.job_sections import Classifier, Convert, Evaluation, Output, Sampling, TokenizerLoss
from grpo.config.sections import (
    ActivationCheckpoint,
    Checkpoint,
    Compile,
    Data,
    Debug,
    Metrics,
    Model,
    Objective,
    Optimizer,
    Parallel,
    Reward,
    Rollout,
    Section,
    Tokenizer,
    Training,
)

WITHOUT_CHECKS = {"checks": False}
"""Validation context that leaves the checks across keys to the caller (`Recipe.problems`)."""


class Recipe(BaseModel):
    """Base of all recipes; every field is a section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: ClassVar[str]
    """Name of the script in recipes/ that runs this recipe, and the value of the key `job` in its file."""
    problem_checks: ClassVar[tuple[Callable[[Self], list[Problem]], ...]] = ()
    """Combinations that cannot work."""
    note_checks: ClassVar[tuple[Callable[[Self], list[str]], ...]] = ()
    """Settings that have no effect."""

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Name and class of every section, in the order of the file."""
        return {name: field.annotation for name, field in cls.model_fields.items()}

    @model_validator(mode="after")
    def _check_combinations(self, info: ValidationInfo) -> Self:
        if info.context != WITHOUT_CHECKS and (problems := self.problems()):
            raise ValueError("; ".join(problem.text for problem in problems))
        return self

    def problems(self) -> list[Problem]:
        """Every impossible combination of keys; empty for a valid recipe."""
        return [problem for check in self.problem_checks for problem in check(self)]

    def notes(self) -> list[str]:
        """One line for each setting that has no effect next to the others."""
        return [note for check in self.note_checks for note in check(self)]

    def to_toml(self) -> str:
        """The resolved recipe, to be loaded again as it is: every key but those that are none, which TOML lacks."""
        return tomli_w.dumps({"job": self.job, **self.model_dump(exclude_none=True)})


class TrainingRecipe(Recipe):
    """Base of the recipes of runs, which have a folder and checkpoints."""

    if TYPE_CHECKING:  # declared by each job, so that its sections keep the order in which they are read
        checkpoint: Checkpoint
        metrics: Metrics

    @property
    def run_dir(self) -> Path:
        """The run's folder: `metrics.run_dir`, which `load_recipe` sets to runs/<name of the recipe file>."""
        return Path(self.metrics.run_dir or f"runs/{self.job}")

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the checkpoints: inside the run's folder unless `checkpoint.dir` was moved."""
        moved = self.checkpoint.dir.rstrip("/") != Checkpoint().dir
        return Path(self.checkpoint.dir) if moved else self.run_dir / self.checkpoint.dir


class GRPORecipe(TrainingRecipe):
    """Reinforcement learning of the generator: rollout, reward, advantage, update."""

    job = "grpo"
    problem_checks = (
        checks.model_problems,
        checks.data_problems,
        checks.tokenizer_problems,
        checks.parallel_problems,
        checks.grpo_problems,
    )
    note_checks = (notes.training_notes, notes.grpo_notes)

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    parallel: Parallel = Parallel()
    compile: Compile = Compile()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    debug: Debug = Debug()


class PretrainRecipe(TrainingRecipe):
    """Next-token training of the generator on the codes of real images."""

    job = "pretrain"
    problem_checks = (
        checks.model_problems,
        checks.data_problems,
        checks.tokenizer_problems,
        checks.parallel_problems,
    )
    note_checks = (notes.training_notes,)

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    parallel: Parallel = Parallel()
    compile: Compile = Compile()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    debug: Debug = Debug()


class TokenizerRecipe(TrainingRecipe):
    """Training of the VQ tokenizer."""

    job = "train_tokenizer"
    problem_checks = (checks.data_problems, checks.image_size_problems, checks.parallel_problems)
    note_checks = (notes.training_notes, notes.tokenizer_notes)

    tokenizer: Tokenizer = Tokenizer()
    tokenizer_loss: TokenizerLoss = TokenizerLoss()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    parallel: Parallel = Parallel()
    compile: Compile = Compile()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    debug: Debug = Debug()


class ClassifierRecipe(TrainingRecipe):
    """Training of a small classifier, to reward or to judge."""

    job = "train_classifier"
    problem_checks = (checks.data_problems, checks.parallel_problems)
    note_checks = (notes.training_notes,)

    classifier: Classifier = Classifier()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    debug: Debug = Debug()


class GenerateRecipe(Recipe):
    """Images from a trained generator."""

    job = "generate"
    problem_checks = (checks.generator_problems, checks.output_problems)

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    sampling: Sampling = Sampling()
    output: Output = Output()
    parallel: Parallel = Parallel()


class EvaluateRecipe(Recipe):
    """FID and its companions of a generator, or of a set of images."""

    job = "evaluate"
    problem_checks = (checks.evaluation_problems,)
    note_checks = (notes.evaluation_notes,)

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    sampling: Sampling = Sampling()
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    parallel: Parallel = Parallel()


class ConvertRecipe(Recipe):
    """Weights from one layout into another."""

    job = "convert"
    problem_checks = (checks.convert_problems,)

    convert: Convert = Convert()


RECIPES: Mapping[str, type[Recipe]] = {
    recipe.job: recipe
    for recipe in (
        GRPORecipe,
        PretrainRecipe,
        TokenizerRecipe,
        ClassifierRecipe,
        GenerateRecipe,
        EvaluateRecipe,
        ConvertRecipe,
    )
}
"""Recipe class of each job."""


def flatten(recipe: Recipe) -> dict[str, object]:
    """Value of every `section.key`."""
    return {f"{name}.{key}": value for name, section in recipe.model_dump().items() for key, value in section.items()}


def differences(before: Recipe, after: Recipe) -> list[str]:
    """One line for each key whose value is not the same, for two recipes of the same job."""
    old, new = flatten(before), flatten(after)
    return [f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]
