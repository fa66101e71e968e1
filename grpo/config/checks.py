"""Checks across the keys of a recipe: what cannot work together.

A check takes the sections that it looks at and gives a line for all that it finds, so that a user mends a recipe once.
The line names every key that takes part as `section.key`; the loader tells by them where the mistake was made.
"""

from collections.abc import Iterator

from grpo.config.job_sections import Evaluation, Sampling
from grpo.config.reward_kinds import reward_class
from grpo.config.reward_sections import Rewards
from grpo.config.sections import Data, Model, Objective, Rollout, Section, Tokenizer, Training


def required(name: str, section: Section, *keys: str) -> Iterator[str]:
    """Optional keys that a job cannot do without."""
    for key in keys:
        if getattr(section, key) is None:
            yield f"{name}.{key} is required"


def model_problems(model: Model) -> Iterator[str]:
    """Text-conditional models, with many condition tokens, are another family."""
    if model.cls_token_num != 1:
        yield "model.cls_token_num must be 1: models here are class-conditional"


def data_problems(data: Data) -> Iterator[str]:
    """A data set needs a path unless it comes with the project."""
    if data.path is None and data.name not in ("digits", "synthetic"):
        yield f'data.path is required with data.name = "{data.name}"'


def image_size_problems(key: str, image_size: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Images are cut into whole codes."""
    if image_size % tokenizer.downsample_size:
        yield f"{key} = {image_size} must be a multiple of tokenizer.downsample_size = {tokenizer.downsample_size}"


def tokenizer_problems(tokenizer: Tokenizer, data: Data) -> Iterator[str]:
    """A trained tokenizer is needed, except to try the machinery on synthetic images."""
    yield from image_size_problems("data.image_size", data.image_size, tokenizer)
    if tokenizer.checkpoint is None and data.name != "synthetic":
        yield 'tokenizer.checkpoint is required (only data.name = "synthetic" runs on random weights)'


def dropout_problems(model: Model, training: Training) -> Iterator[str]:
    """Dropout would falsify the ratio of new and old probabilities."""
    same_masks = "old and new log-probs need the same masks; dropout is for pre-training"
    for key, share in (("class_dropout", model.class_dropout), ("dropout", model.dropout)):
        if share:
            yield f"model.{key} must be 0 in GRPO: {same_masks}"
    if training.dropout_mode != "eval":
        yield f'training.dropout_mode must be "eval" in GRPO: {same_masks}'


def batch_problems(rollout: Rollout, training: Training, objective: Objective) -> Iterator[str]:
    """A rollout is cut into whole optimizer steps, a step into whole groups or a group into whole steps."""
    group, drawn = rollout.num_generations, rollout.batch_size * rollout.num_generations
    step = training.batch_size or drawn
    if drawn % step:
        yield (
            f"training.batch_size = {step} completions of one optimizer step must divide "
            f"rollout.batch_size x rollout.num_generations = {drawn} completions of one rollout"
        )
    elif step % group and group % step:
        yield f"training.batch_size = {step} must be a multiple or a divisor of rollout.num_generations = {group}"
    if group == 1 and objective.advantage != "batch_std":  # which is the only one without the group's mean
        yield f'rollout.num_generations must be at least 2 with objective.advantage = "{objective.advantage}"'


def reward_problems(rewards: Rewards, rollout: Rollout) -> Iterator[str]:
    """There is a reward, and none that needs what the rollout has not."""
    if not rewards.active:
        yield "no reward is on: give a table [reward.NAME] a weight other than 0"
    for name, table in rewards.active.items():
        if rollout.mode == "autoregressive" and "real_images" in reward_class(table.kind).needs:
            yield (
                f'reward.{name}.weight must be 0 with rollout.mode = "autoregressive": '
                "a free sample has no real image to match"
            )


def rollout_problems(rollout: Rollout) -> Iterator[str]:
    """What only one of the two rollout modes can do."""
    if rollout.mode == "teacher_forced" and rollout.cfg_scale != 1:
        yield 'rollout.cfg_scale: guidance needs rollout.mode = "autoregressive"; set it to 1'
    if rollout.mode == "autoregressive" and rollout.use_context_noise:
        yield 'rollout.use_context_noise: needs rollout.mode = "teacher_forced"'
    if rollout.importance_weight_cap and rollout.cfg_scale != 1 and rollout.guidance_in_loss == "conditional":
        yield (
            'rollout.importance_weight_cap with guidance needs rollout.guidance_in_loss = "guided" '
            "or rollout.cfg_scale = 1"
        )


def generator_problems(model: Model, tokenizer: Tokenizer, sampling: Sampling) -> Iterator[str]:
    """Drawing images takes both networks, whole codes and known classes."""
    yield from model_problems(model)
    yield from required("model", model, "checkpoint")
    yield from required("tokenizer", tokenizer, "checkpoint")
    yield from image_size_problems("sampling.image_size", sampling.image_size, tokenizer)
    if sampling.class_ids != "all" and not all(i < model.num_classes for i in sampling.class_ids):
        yield f"sampling.class_ids must be below model.num_classes = {model.num_classes}"


def evaluation_problems(evaluation: Evaluation, sampling: Sampling, data: Data) -> Iterator[str]:
    """A reference, of the side of the images that are drawn, and a network that gives features."""
    if evaluation.reference is None:
        yield from (f"{problem} unless evaluation.reference is set" for problem in data_problems(data))
        if evaluation.images is None and data.image_size != (sampling.resize_to or sampling.image_size):
            key = "sampling.resize_to" if sampling.resize_to else "sampling.image_size"
            yield f"{key} must equal data.image_size = {data.image_size} of the reference images"
    if evaluation.feature_checkpoint is None and evaluation.inception_checkpoint is None:
        yield "evaluation.feature_checkpoint or evaluation.inception_checkpoint is required"
