"""The recipe of each job: its sections, and what belongs to the recipe as a whole.

A recipe object is always valid: every key by its section, every combination by the checks of its job.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from grpo.config import checks, notes
from grpo.config.checks import Problem
from grpo.config.job_sections import Classifier, Convert, Evaluation, Output, Sampling, TokenizerLoss
from grpo.config.reward_sections import Rewards
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
    Rollout,
    Section,
    Tokenizer,
    Training,
)

WITHOUT_CHECKS = {"checks": False}
"""Validation context that leaves the checks across keys to the caller (`Recipe.problems`)."""

ORDER = (
    "convert", "model", "tokenizer", "tokenizer_loss", "classifier", "sampling", "output", "data", "evaluation",
    "rollout", "reward", "objective", "optimizer", "training", "parallel", "compile", "activation_checkpoint",
    "checkpoint", "metrics", "debug",
)  # fmt: skip
"""Sections in the order in which a reader wants them, whichever class declares them."""


class Recipe(BaseModel):
    """Base of all recipes; every field is a section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: ClassVar[str]
    """Word of the job on the command line, and the value of the key `job` in its file."""

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Name and class of every section, in the order of the file."""
        return {name: cls.model_fields[name].annotation for name in sorted(cls.model_fields, key=ORDER.index)}

    @model_validator(mode="after")
    def _check_combinations(self, info: ValidationInfo) -> Self:
        if info.context != WITHOUT_CHECKS and (problems := self.problems()):
            raise ValueError("; ".join(problem.text for problem in problems))
        return self

    def problems(self) -> list[Problem]:
        """Every impossible combination of keys; empty for a valid recipe."""
        return []

    def notes(self) -> list[str]:
        """One line for each setting that has no effect next to the others."""
        return []

    def free_keys(self) -> set[str]:
        """Every `section.key` that a resumed run may change, because it only moves work around."""
        return {f"{name}.{key}" for name, section in self.sections().items() for key in section.free_keys()}

    def to_toml(self) -> str:
        """The resolved recipe, to be loaded again as it is: every key but those that are none, which TOML lacks."""
        return tomli_w.dumps({"job": self.job, **self._values(exclude_none=True)})

    def _values(self, **options: Any) -> dict[str, Any]:
        """The recipe as a file has it."""
        values = self.model_dump(**options)
        return {name: values[name] for name in self.sections()}


class TrainingRecipe(Recipe):
    """Base of the recipes of runs, which have a folder and checkpoints."""

    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    debug: Debug = Debug()

    def problems(self) -> list[Problem]:
        return [*checks.data_problems(self.data), *checks.parallel_problems(self.parallel)]

    def notes(self) -> list[str]:
        return notes.training_notes(self.optimizer, self.checkpoint, self.metrics)

    @property
    def run_dir(self) -> Path:
        """The run's folder: `metrics.run_dir`, which `load_recipe` sets to runs/<name of the recipe file>."""
        return Path(self.metrics.run_dir or f"runs/{self.job}")

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the checkpoints: inside the run's folder unless `checkpoint.dir` was moved."""
        moved = self.checkpoint.dir.rstrip("/") != Checkpoint().dir
        return Path(self.checkpoint.dir) if moved else self.run_dir / self.checkpoint.dir


class GeneratorRecipe(TrainingRecipe):
    """Base of the recipes that train the generator."""

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    compile: Compile = Compile()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()

    def problems(self) -> list[Problem]:
        generator = [*checks.model_problems(self.model), *checks.tokenizer_problems(self.tokenizer, self.data)]
        return [*super().problems(), *generator]


class PretrainRecipe(GeneratorRecipe):
    """Next-token training of the generator on the codes of real images."""

    job = "pretrain"


class GRPORecipe(GeneratorRecipe):
    """Reinforcement learning of the generator: rollout, reward, advantage, update."""

    job = "train"

    rollout: Rollout = Rollout()
    reward: Rewards = Field(default_factory=Rewards)
    objective: Objective = Objective()

    def problems(self) -> list[Problem]:
        return [
            *super().problems(),
            *checks.dropout_problems(self.model, self.training),
            *checks.batch_problems(self.rollout, self.training, self.objective),
            *checks.reward_problems(self.reward, self.rollout),
            *checks.rollout_problems(self.rollout),
        ]

    def notes(self) -> list[str]:
        return [*super().notes(), *notes.grpo_notes(self.rollout, self.objective, self.reward)]

    def free_keys(self) -> set[str]:
        tables = self.reward.tables.items()
        return super().free_keys() | {f"reward.{name}.{key}" for name, table in tables for key in table.free_keys()}


class TokenizerRecipe(TrainingRecipe):
    """Training of the VQ tokenizer."""

    job = "tokenizer"

    tokenizer: Tokenizer = Tokenizer()
    tokenizer_loss: TokenizerLoss = TokenizerLoss()
    compile: Compile = Compile()

    def problems(self) -> list[Problem]:
        size = checks.image_size_problems("data.image_size", self.data.image_size, self.tokenizer)
        return [*super().problems(), *size]

    def notes(self) -> list[str]:
        return [*super().notes(), *notes.tokenizer_notes(self.tokenizer_loss)]


class ClassifierRecipe(TrainingRecipe):
    """Training of a small classifier, to reward or to judge."""

    job = "classifier"

    classifier: Classifier = Classifier()


class GenerateRecipe(Recipe):
    """Images from a trained generator."""

    job = "generate"

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    sampling: Sampling = Sampling()
    output: Output = Output()
    parallel: Parallel = Parallel()

    def problems(self) -> list[Problem]:
        generator = checks.generator_problems(self.model, self.tokenizer, self.sampling)
        return [*generator, *checks.output_problems(self.output)]


class EvaluateRecipe(Recipe):
    """FID and its companions of a generator, or of a set of images."""

    job = "evaluate"

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    sampling: Sampling = Sampling()
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    parallel: Parallel = Parallel()

    def problems(self) -> list[Problem]:
        is_drawn = self.evaluation.images is None
        generator = checks.generator_problems(self.model, self.tokenizer, self.sampling) if is_drawn else []
        return [*generator, *checks.evaluation_problems(self.evaluation, self.sampling, self.data)]

    def notes(self) -> list[str]:
        return notes.evaluation_notes(self.evaluation, self.sampling, self.model, self.tokenizer)


class ConvertRecipe(Recipe):
    """Weights from one layout into another."""

    job = "convert"

    convert: Convert = Convert()

    def problems(self) -> list[Problem]:
        return checks.required("convert", self.convert, ["input", "output"])


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

FORMER_JOBS = {"grpo": "train", "train_tokenizer": "tokenizer", "train_classifier": "classifier"}
"""What files of former versions call a job."""

FORMER_KEYS = {
    "reward.reconstruction": "it is now reward.reconstruction.distance",
    "reward.reconstruction_weight": "it is now reward.reconstruction.weight",
    "reward.class_log_prob_weight": "it is now reward.class_log_prob.weight",
    "reward.classifier_checkpoint": "it is now reward.class_log_prob.checkpoint",
    "reward.embedding_cosine": "it is now reward.embedding_cosine.weight",
    "reward.embedding_cosine_weight": "it is now reward.embedding_cosine.weight",
    "training.gradient_accumulation_steps": "training.batch_size is now all that an optimizer step takes, on all ranks",
    "optimizer.cpu_offload": "it is gone",
}
"""Keys of former versions, and what became of them."""


def differences(before: Recipe, after: Recipe) -> list[str]:
    """One line for each key whose value is not the same, for two recipes of the same job."""
    return list(_changed_keys(before, after).values())


def changes_that_matter(before: Recipe, after: Recipe) -> list[str]:
    """Those of `differences` that a resumed run may not have: all but the keys that only move work around."""
    return [line for key, line in _changed_keys(before, after).items() if key not in after.free_keys()]


def _changed_keys(before: Recipe, after: Recipe) -> dict[str, str]:
    old, new = _flatten(before._values()), _flatten(after._values())
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Value of every `section.key` and `reward.NAME.key`."""
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
