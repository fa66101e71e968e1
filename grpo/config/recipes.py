"""The recipe of each job: its sections, and what belongs to the recipe as a whole.

A recipe object is always valid: every key by its section, every combination by the checks of its job.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator

from grpo.config import checks
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
    def _check_combinations(self) -> Self:
        if problems := list(self.problems()):
            raise ValueError("; ".join(problems))
        return self

    def problems(self) -> Iterator[str]:
        """A line for every impossible combination of keys; none for a valid recipe."""
        yield from ()

    def notes(self) -> list[str]:
        """One line for each setting that has no effect next to the others."""
        changed = _changed_keys(type(self).model_construct(), self)
        idle = [(key, reason) for is_idle, keys, reason in self._idle_keys() if is_idle for key in keys.split()]
        return [f"{key} has no effect: {reason}" for key, reason in idle if key in changed]

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        """Whether it is so, the keys that then have no effect, and why."""
        return []

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

    def problems(self) -> Iterator[str]:
        yield from checks.data_problems(self.data)
        if self.parallel.data_parallel == "sdp" and self.parallel.reshard_after_forward == "always":
            yield (
                'parallel.reshard_after_forward = "always" contradicts parallel.data_parallel = "sdp"; '
                'set parallel.data_parallel = "fsdp"'
            )

    def notes(self) -> list[str]:
        notes = super().notes()
        if not self.checkpoint.save_final and not self.checkpoint.interval:
            notes.append("checkpoint.interval = 0 and checkpoint.save_final = false: nothing of this run is saved")
        return notes

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        wandb = "metrics.wandb_project metrics.wandb_entity metrics.wandb_run_name"
        best = "checkpoint.best_metric checkpoint.best_is"
        return [
            (self.optimizer.schedule == "one_cycle", "optimizer.warmup_steps", "one_cycle has its own warm-up"),
            (not self.checkpoint.keep_last, "checkpoint.keep_best", "checkpoint.keep_last = 0 keeps all"),
            (not self.checkpoint.keep_best, best, "checkpoint.keep_best is 0"),
            (not self.metrics.wandb, wandb, "metrics.wandb is off"),
        ]

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

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from checks.model_problems(self.model)
        yield from checks.tokenizer_problems(self.tokenizer, self.data)


class PretrainRecipe(GeneratorRecipe):
    """Next-token training of the generator on the codes of real images."""

    job = "pretrain"


class GRPORecipe(GeneratorRecipe):
    """Reinforcement learning of the generator: rollout, reward, advantage, update."""

    job = "train"

    rollout: Rollout = Rollout()
    reward: Rewards = Field(default_factory=Rewards)
    objective: Objective = Objective()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from checks.dropout_problems(self.model, self.training)
        yield from checks.batch_problems(self.rollout, self.training, self.objective)
        yield from checks.reward_problems(self.reward, self.rollout)
        yield from checks.rollout_problems(self.rollout)

    def notes(self) -> list[str]:
        off = [name for name in self.reward.tables if name not in self.reward.active]
        return [*super().notes(), *(f"reward.{name} has no effect: its weight is 0" for name in off)]

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        rollout, objective = self.rollout, self.objective
        no_kl = objective.kl_estimator == "none"
        one_reward = objective.advantage == "gdpo" and len(self.reward.active) == 1
        is_whole = not rollout.top_k and rollout.top_p == 1
        return [
            *super()._idle_keys(),
            (no_kl, "objective.kl_coef objective.reference_checkpoint", 'the KL term is off (objective.kl = "none")'),
            (not objective.use_token_dropout, "objective.token_dropout", "objective.use_token_dropout is off"),
            (one_reward, "objective.advantage", "with one reward gdpo is group_std"),
            (not rollout.use_context_noise, "rollout.context_noise", "rollout.use_context_noise is off"),
            (is_whole, "rollout.importance_weight_cap", "neither top_k nor top_p truncates the draw"),
            (rollout.cfg_scale == 1, "rollout.guidance_in_loss", "guidance is off (rollout.cfg_scale = 1)"),
            (rollout.mode == "teacher_forced", "rollout.max_rows", "teacher-forced rollouts have no cache"),
        ]


class TokenizerRecipe(TrainingRecipe):
    """Training of the VQ tokenizer."""

    job = "tokenizer"

    tokenizer: Tokenizer = Tokenizer()
    tokenizer_loss: TokenizerLoss = TokenizerLoss()
    compile: Compile = Compile()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from checks.image_size_problems("data.image_size", self.data.image_size, self.tokenizer)

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        by_gradient = self.tokenizer_loss.codebook_update == "gradient"
        keys = "tokenizer_loss.codebook_ema tokenizer_loss.restart_threshold"
        return [*super()._idle_keys(), (by_gradient, keys, 'codebook_update is "gradient"')]


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

    def problems(self) -> Iterator[str]:
        yield from checks.generator_problems(self.model, self.tokenizer, self.sampling)
        if not (self.output.grid or self.output.folder or self.output.npz):
            yield "nothing to write: set output.grid, output.folder or output.npz"


class EvaluateRecipe(Recipe):
    """FID and its companions of a generator, or of a set of images."""

    job = "evaluate"

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    sampling: Sampling = Sampling()
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    parallel: Parallel = Parallel()

    def problems(self) -> Iterator[str]:
        if self.evaluation.images is None:
            yield from checks.generator_problems(self.model, self.tokenizer, self.sampling)
        yield from checks.evaluation_problems(self.evaluation, self.sampling, self.data)

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        keys = ["model.checkpoint", "tokenizer.checkpoint", *(f"sampling.{key}" for key in Sampling.model_fields)]
        are_given = self.evaluation.images is not None
        return [(are_given, " ".join(keys), "evaluation.images are not drawn from a model")]


class ConvertRecipe(Recipe):
    """Weights from one layout into another."""

    job = "convert"

    convert: Convert = Convert()

    def problems(self) -> Iterator[str]:
        return checks.required("convert", self.convert, "input", "output")


_ALL = (GRPORecipe, PretrainRecipe, TokenizerRecipe, ClassifierRecipe, GenerateRecipe, EvaluateRecipe, ConvertRecipe)
RECIPES: Mapping[str, type[Recipe]] = {recipe.job: recipe for recipe in _ALL}
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


def job_named(word: object) -> str | None:
    """The job that a recipe file calls so; None where there is none."""
    job = FORMER_JOBS.get(str(word), str(word))
    return job if job in RECIPES else None


def differences(before: Recipe, after: Recipe) -> list[str]:
    """One line for each key whose value is not the same, for two recipes of the same job."""
    return list(_changed_keys(before, after).values())


def changes_that_matter(before: Recipe, after: Recipe) -> list[str]:
    """Those of `differences` that a resumed run may not have: all but the keys that only move work around."""
    free = {f"{name}.{key}" for name, section in after.sections().items() for key in section.free_keys()}
    return [line for key, line in _changed_keys(before, after).items() if key not in free]


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
