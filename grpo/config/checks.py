"""Checks across the keys of a recipe: what cannot work together, and what has no effect.

Every check looks at the whole recipe and returns all that it finds, so that a user mends a recipe once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo.config.sections import Reward, Section

if TYPE_CHECKING:
    from grpo.config.recipes import (
        ConvertRecipe,
        EvaluateRecipe,
        GenerateRecipe,
        GRPORecipe,
        PretrainRecipe,
        TokenizerRecipe,
        TrainingRecipe,
    )

SELF_CONTAINED_DATA = ("digits", "synthetic")
GROUP_BASELINES = ("group_std", "group_mean", "leave_one_out", "gdpo")


@dataclass(frozen=True)
class Problem:
    """An impossible combination.

    Args:
        keys: every `section.key` that takes part in it.
        text: what is wrong and what to do.
    """

    keys: tuple[str, ...]
    text: str


def model_problems(recipe: GRPORecipe | PretrainRecipe | GenerateRecipe | EvaluateRecipe) -> list[Problem]:
    """Text-conditional models, with many condition tokens, are another family."""
    if recipe.model.cls_token_num == 1:
        return []
    return [Problem(("model.cls_token_num",), "model.cls_token_num must be 1: models here are class-conditional")]


def data_problems(recipe: TrainingRecipe | EvaluateRecipe) -> list[Problem]:
    """A data set needs a path unless it comes with the project."""
    data = recipe.data
    if data.path is None and data.name not in SELF_CONTAINED_DATA:
        return [Problem(("data.path", "data.name"), f'data.path is required with data.name = "{data.name}"')]
    return []


def parallel_problems(recipe: TrainingRecipe) -> list[Problem]:
    """sdp is the mode that keeps its parameters gathered."""
    parallel = recipe.parallel
    if parallel.data_parallel != "sdp" or parallel.reshard_after_forward != "always":
        return []
    text = 'parallel.reshard_after_forward = "always" contradicts data_parallel = "sdp"; set data_parallel = "fsdp"'
    return [Problem(("parallel.reshard_after_forward", "parallel.data_parallel"), text)]


def image_size_problems(recipe: GRPORecipe | PretrainRecipe | TokenizerRecipe) -> list[Problem]:
    """Images are cut into whole codes."""
    return _divisible_image_size("data.image_size", recipe.data.image_size, recipe.tokenizer.downsample_size)


def tokenizer_problems(recipe: GRPORecipe | PretrainRecipe) -> list[Problem]:
    """A trained tokenizer is needed, except to try the machinery on synthetic images."""
    problems = image_size_problems(recipe)
    if recipe.tokenizer.checkpoint is None and recipe.data.name != "synthetic":
        text = 'tokenizer.checkpoint is required (only data.name = "synthetic" runs on random weights)'
        problems.append(Problem(("tokenizer.checkpoint", "data.name"), text))
    return problems


def grpo_problems(recipe: GRPORecipe) -> list[Problem]:
    """All that cannot work in GRPO besides data and tokenizer."""
    return [
        *_refused_settings(recipe),
        *_batch_problems(recipe),
        *_group_problems(recipe),
        *_reward_problems(recipe),
        *_mode_problems(recipe),
    ]


def _refused_settings(recipe: GRPORecipe) -> list[Problem]:
    """Settings of the reference trainer that are not available, and dropout, which would falsify the ratio."""
    problems = [
        Problem((f"reward.{key}",), f"reward.{key} is not available yet: leave it at its default")
        for key in changed(recipe.reward)
        if key == "lpips_weight" or key.startswith("discriminator")
    ]
    same_masks = "old and new log-probs need the same masks; dropout is for pre-training"
    for key in ("class_dropout", "dropout"):
        if getattr(recipe.model, key) > 0:
            problems.append(Problem((f"model.{key}",), f"model.{key} must be 0 in GRPO: {same_masks}"))
    if recipe.training.dropout_mode != "eval":
        text = f'training.dropout_mode must be "eval" in GRPO: {same_masks}'
        problems.append(Problem(("training.dropout_mode",), text))
    return problems


def _batch_problems(recipe: GRPORecipe) -> list[Problem]:
    """A rollout is cut into whole optimizer steps, an optimizer step into whole groups or a group into whole steps."""
    rollout, training = recipe.rollout, recipe.training
    group = rollout.num_generations
    drawn = rollout.batch_size * group
    step = training.batch_size * training.gradient_accumulation_steps
    step_keys = ("training.batch_size", "training.gradient_accumulation_steps")
    step_text = f"training.batch_size x gradient_accumulation_steps = {step} completions of one optimizer step"
    if drawn % step:
        text = f"{step_text} must divide rollout.batch_size x num_generations = {drawn} completions of one rollout"
        return [Problem((*step_keys, "rollout.batch_size", "rollout.num_generations"), text)]
    if step % group and group % step:
        text = f"{step_text} must be a multiple or a divisor of rollout.num_generations = {group}"
        return [Problem((*step_keys, "rollout.num_generations"), text)]
    return []


def _group_problems(recipe: GRPORecipe) -> list[Problem]:
    """A group of one has no baseline."""
    advantage = recipe.objective.advantage
    if recipe.rollout.num_generations > 1 or advantage not in GROUP_BASELINES:
        return []
    text = f'rollout.num_generations must be at least 2 with objective.advantage = "{advantage}"'
    return [Problem(("rollout.num_generations", "objective.advantage"), text)]


def _reward_problems(recipe: GRPORecipe) -> list[Problem]:
    """There is a reward, and its network is there."""
    reward = recipe.reward
    problems = []
    if not active_rewards(reward):
        keys = ("reconstruction_weight", "class_log_prob_weight", "embedding_cosine", "embedding_cosine_weight")
        text = "no reward is on: set reward.reconstruction_weight, class_log_prob_weight or embedding_cosine(_weight)"
        problems.append(Problem(tuple(f"reward.{key}" for key in keys), text))
    if reward.class_log_prob_weight and reward.classifier_checkpoint is None:
        text = "reward.class_log_prob_weight needs reward.classifier_checkpoint"
        problems.append(Problem(("reward.class_log_prob_weight", "reward.classifier_checkpoint"), text))
    return problems


def _mode_problems(recipe: GRPORecipe) -> list[Problem]:
    """What only one of the two rollout modes can do."""
    rollout, reward = recipe.rollout, recipe.reward
    conflicts = []
    if rollout.mode == "teacher_forced":
        if rollout.cfg_scale != 1:
            conflicts.append(("rollout.cfg_scale", 'guidance needs rollout.mode = "autoregressive"; set it to 1'))
    else:
        free = "a free sample has no real image to match"
        if rollout.use_context_noise:
            conflicts.append(("rollout.use_context_noise", 'needs rollout.mode = "teacher_forced"'))
        if reward.reconstruction_weight:
            conflicts.append(("reward.reconstruction_weight", f"must be 0 in autoregressive mode: {free}"))
        if reward.embedding_cosine and reward.embedding_cosine_weight:
            conflicts.append(("reward.embedding_cosine", f"must be off in autoregressive mode: {free}"))
    problems = [Problem((key, "rollout.mode"), f"{key}: {text}") for key, text in conflicts]
    if rollout.importance_weight_cap and rollout.cfg_scale != 1 and rollout.guidance_in_loss == "conditional":
        text = 'rollout.importance_weight_cap with guidance needs rollout.guidance_in_loss = "guided"'
        keys = ("rollout.importance_weight_cap", "rollout.cfg_scale", "rollout.guidance_in_loss")
        problems.append(Problem(keys, text))
    return problems


def generator_problems(recipe: GenerateRecipe | EvaluateRecipe) -> list[Problem]:
    """Drawing images takes both networks, whole codes and known classes."""
    problems = model_problems(recipe)
    problems += [
        Problem((f"{section}.checkpoint",), f"{section}.checkpoint is required")
        for section in ("model", "tokenizer")
        if getattr(recipe, section).checkpoint is None
    ]
    problems += _divisible_image_size(
        "sampling.image_size", recipe.sampling.image_size, recipe.tokenizer.downsample_size
    )
    num_classes = recipe.model.num_classes
    if recipe.sampling.class_ids != "all" and not all(i < num_classes for i in recipe.sampling.class_ids):
        text = f"sampling.class_ids must be below model.num_classes = {num_classes}"
        problems.append(Problem(("sampling.class_ids", "model.num_classes"), text))
    return problems


def output_problems(recipe: GenerateRecipe) -> list[Problem]:
    """Images go somewhere."""
    output = recipe.output
    if output.grid or output.folder or output.npz:
        return []
    keys = ("output.grid", "output.folder", "output.npz")
    return [Problem(keys, "nothing to write: set output.grid, output.folder or output.npz")]


def evaluation_problems(recipe: EvaluateRecipe) -> list[Problem]:
    """Images to measure, a reference, and a network that gives features."""
    evaluation = recipe.evaluation
    problems = []
    if evaluation.images is None:
        problems += generator_problems(recipe)
    if evaluation.reference is None:
        problems += [
            Problem((*problem.keys, "evaluation.reference"), f"{problem.text} unless evaluation.reference is set")
            for problem in data_problems(recipe)
        ]
        problems += _different_sides(recipe)
    if evaluation.feature_checkpoint is None and evaluation.inception_checkpoint is None:
        keys = ("evaluation.feature_checkpoint", "evaluation.inception_checkpoint")
        problems.append(Problem(keys, f"{keys[0]} or {keys[1]} is required"))
    return problems


def _different_sides(recipe: EvaluateRecipe) -> list[Problem]:
    """Drawn images are compared with reference images of the same side."""
    sampling, side = recipe.sampling, recipe.data.image_size
    if recipe.evaluation.images is not None or side == (sampling.resize_to or sampling.image_size):
        return []
    key = "sampling.resize_to" if sampling.resize_to else "sampling.image_size"
    text = f"{key} must equal data.image_size = {side} of the reference images"
    return [Problem((key, "data.image_size"), text)]


def convert_problems(recipe: ConvertRecipe) -> list[Problem]:
    """Something to read and somewhere to write."""
    return [
        Problem((f"convert.{key}",), f"convert.{key} is required")
        for key in ("input", "output")
        if getattr(recipe.convert, key) is None
    ]


def _divisible_image_size(key: str, image_size: int, downsample_size: int) -> list[Problem]:
    if image_size % downsample_size == 0:
        return []
    text = f"{key} = {image_size} must be a multiple of tokenizer.downsample_size = {downsample_size}"
    return [Problem((key, "tokenizer.downsample_size"), text)]


def active_rewards(reward: Reward) -> list[str]:
    """Names of the rewards with a weight other than 0."""
    weights = {
        "reconstruction": reward.reconstruction_weight,
        "class_log_prob": reward.class_log_prob_weight,
        "embedding_cosine": reward.embedding_cosine_weight if reward.embedding_cosine else 0.0,
    }
    return [name for name, weight in weights.items() if weight]


def changed(section: Section) -> list[str]:
    """Keys of a section that are not at their defaults."""
    default = type(section)()
    return [key for key in type(section).model_fields if getattr(section, key) != getattr(default, key)]
