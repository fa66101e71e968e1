"""Checks across the keys of a recipe: what cannot work together.

Every check takes the sections that it looks at and returns all that it finds, so that a user mends a recipe once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo.config.job_sections import Convert, Evaluation, Output, Sampling
from grpo.config.reward_kinds import reward_class
from grpo.config.reward_sections import Rewards
from grpo.config.sections import Data, Model, Objective, Parallel, Rollout, Tokenizer, Training


@dataclass(frozen=True)
class Problem:
    """An impossible combination.

    Args:
        keys: every `section.key` that takes part in it.
        text: what is wrong and what to do.
    """

    keys: tuple[str, ...]
    text: str


def model_problems(model: Model) -> list[Problem]:
    """Text-conditional models, with many condition tokens, are another family."""
    if model.cls_token_num == 1:
        return []
    return [Problem(("model.cls_token_num",), "model.cls_token_num must be 1: models here are class-conditional")]


def data_problems(data: Data) -> list[Problem]:
    """A data set needs a path unless it comes with the project."""
    if data.path is None and not data.is_built_in:
        return [Problem(("data.path", "data.name"), f'data.path is required with data.name = "{data.name}"')]
    return []


def parallel_problems(parallel: Parallel) -> list[Problem]:
    """sdp is the mode that keeps its parameters gathered."""
    if parallel.data_parallel != "sdp" or parallel.reshard_after_forward != "always":
        return []
    text = 'parallel.reshard_after_forward = "always" contradicts data_parallel = "sdp"; set data_parallel = "fsdp"'
    return [Problem(("parallel.reshard_after_forward", "parallel.data_parallel"), text)]


def image_size_problems(key: str, image_size: int, tokenizer: Tokenizer) -> list[Problem]:
    """Images are cut into whole codes."""
    if image_size % tokenizer.downsample_size == 0:
        return []
    text = f"{key} = {image_size} must be a multiple of tokenizer.downsample_size = {tokenizer.downsample_size}"
    return [Problem((key, "tokenizer.downsample_size"), text)]


def tokenizer_problems(tokenizer: Tokenizer, data: Data) -> list[Problem]:
    """A trained tokenizer is needed, except to try the machinery on synthetic images."""
    problems = image_size_problems("data.image_size", data.image_size, tokenizer)
    if tokenizer.checkpoint is None and data.name != "synthetic":
        text = 'tokenizer.checkpoint is required (only data.name = "synthetic" runs on random weights)'
        problems.append(Problem(("tokenizer.checkpoint", "data.name"), text))
    return problems


def dropout_problems(model: Model, training: Training) -> list[Problem]:
    """Dropout would falsify the ratio of new and old probabilities."""
    same_masks = "old and new log-probs need the same masks; dropout is for pre-training"
    problems = [
        Problem((f"model.{key}",), f"model.{key} must be 0 in GRPO: {same_masks}")
        for key in ("class_dropout", "dropout")
        if getattr(model, key) > 0
    ]
    if training.dropout_mode != "eval":
        text = f'training.dropout_mode must be "eval" in GRPO: {same_masks}'
        problems.append(Problem(("training.dropout_mode",), text))
    return problems


def batch_problems(rollout: Rollout, training: Training, objective: Objective) -> list[Problem]:
    """A rollout is cut into whole optimizer steps, a step into whole groups or a group into whole steps."""
    group, drawn = rollout.num_generations, rollout.batch_size * rollout.num_generations
    step = training.batch_size or drawn
    problems = []
    if drawn % step:
        keys = ("training.batch_size", "rollout.batch_size", "rollout.num_generations")
        text = f"training.batch_size = {step} completions of one optimizer step must divide "
        text += f"rollout.batch_size x num_generations = {drawn} completions of one rollout"
        problems.append(Problem(keys, text))
    elif step % group and group % step:
        text = f"training.batch_size = {step} must be a multiple or a divisor of rollout.num_generations = {group}"
        problems.append(Problem(("training.batch_size", "rollout.num_generations"), text))
    if group == 1 and objective.advantage != "batch_std":  # which is the only one without the group's mean
        text = f'rollout.num_generations must be at least 2 with objective.advantage = "{objective.advantage}"'
        problems.append(Problem(("rollout.num_generations", "objective.advantage"), text))
    return problems


def reward_problems(rewards: Rewards, rollout: Rollout) -> list[Problem]:
    """There is a reward, and none that needs what the rollout has not."""
    if not rewards.active:
        return [Problem(("reward",), "no reward is on: give a table [reward.NAME] a weight other than 0")]
    if rollout.mode == "teacher_forced":
        return []
    return [
        Problem(
            (f"reward.{name}.weight", "rollout.mode", "reward"),
            f"reward.{name}.weight must be 0 in autoregressive mode: a free sample has no real image to match",
        )
        for name, table in rewards.active.items()
        if "real_images" in reward_class(table.kind).needs
    ]


def rollout_problems(rollout: Rollout) -> list[Problem]:
    """What only one of the two rollout modes can do."""
    problems = []
    if rollout.mode == "teacher_forced" and rollout.cfg_scale != 1:
        text = 'rollout.cfg_scale: guidance needs rollout.mode = "autoregressive"; set it to 1'
        problems.append(Problem(("rollout.cfg_scale", "rollout.mode"), text))
    if rollout.mode == "autoregressive" and rollout.use_context_noise:
        text = 'rollout.use_context_noise: needs rollout.mode = "teacher_forced"'
        problems.append(Problem(("rollout.use_context_noise", "rollout.mode"), text))
    if rollout.importance_weight_cap and rollout.cfg_scale != 1 and rollout.guidance_in_loss == "conditional":
        text = 'rollout.importance_weight_cap with guidance needs rollout.guidance_in_loss = "guided"'
        keys = ("rollout.importance_weight_cap", "rollout.cfg_scale", "rollout.guidance_in_loss")
        problems.append(Problem(keys, text))
    return problems


def generator_problems(model: Model, tokenizer: Tokenizer, sampling: Sampling) -> list[Problem]:
    """Drawing images takes both networks, whole codes and known classes."""
    problems = model_problems(model)
    for name, section in (("model", model), ("tokenizer", tokenizer)):
        problems += required(name, section, ["checkpoint"])
    problems += image_size_problems("sampling.image_size", sampling.image_size, tokenizer)
    if sampling.class_ids != "all" and not all(i < model.num_classes for i in sampling.class_ids):
        text = f"sampling.class_ids must be below model.num_classes = {model.num_classes}"
        problems.append(Problem(("sampling.class_ids", "model.num_classes"), text))
    return problems


def output_problems(output: Output) -> list[Problem]:
    """Images go somewhere."""
    if output.grid or output.folder or output.npz:
        return []
    keys = ("output.grid", "output.folder", "output.npz")
    return [Problem(keys, "nothing to write: set output.grid, output.folder or output.npz")]


def evaluation_problems(evaluation: Evaluation, sampling: Sampling, data: Data) -> list[Problem]:
    """A reference, of the side of the images that are drawn, and a network that gives features."""
    problems = []
    if evaluation.reference is None:
        problems += [
            Problem((*problem.keys, "evaluation.reference"), f"{problem.text} unless evaluation.reference is set")
            for problem in data_problems(data)
        ]
        if evaluation.images is None and data.image_size != (sampling.resize_to or sampling.image_size):
            key = "sampling.resize_to" if sampling.resize_to else "sampling.image_size"
            text = f"{key} must equal data.image_size = {data.image_size} of the reference images"
            problems.append(Problem((key, "data.image_size"), text))
    if evaluation.feature_checkpoint is None and evaluation.inception_checkpoint is None:
        keys = ("evaluation.feature_checkpoint", "evaluation.inception_checkpoint")
        problems.append(Problem(keys, f"{keys[0]} or {keys[1]} is required"))
    return problems


def required(name: str, section: Convert | Model | Tokenizer, keys: Sequence[str]) -> list[Problem]:
    """Optional keys that a job cannot do without."""
    missing = [f"{name}.{key}" for key in keys if getattr(section, key) is None]
    return [Problem((key,), f"{key} is required") for key in missing]
