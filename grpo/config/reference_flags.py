"""The flags of the reference trainer, and what they mean in keys."""

import os
import re
from collections.abc import Collection, Mapping

from pydantic import FiniteFloat

from grpo.config.sections import PositiveInt, Section

_TABLE = """
model: name gpt-model, checkpoint gpt-ckpt, from_fsdp from-fsdp, num_classes num-classes, cls_token_num cls-token-num,
  class_dropout uncond-prob
tokenizer: name vq-model, checkpoint vq-ckpt, codebook_size codebook-size, codebook_embed_dim codebook-embed-dim,
  downsample_size downsample-size
data: name dataset, path data-path, image_size image-size, num_workers num-workers
rollout: num_generations num-generations, temperature temperature, top_k top-k, top_p top-p,
  use_context_noise use-token-noise, context_noise token-noise-prob
reward: reconstruction.distance reward-rec-type, reconstruction.weight reward-rec-weight,
  embedding_cosine.weight reward-embedcos-weight
objective: advantage_clip adv-clip-max, clip_range clip-range, aux_ce_weight aux-ce-weight, use_kl_loss use-kl-loss,
  kl_coef kl-coef, reference_checkpoint kl-base-ckpt, use_token_dropout use-token-dropout,
  token_dropout token-dropout-ratio
optimizer: lr lr, weight_decay weight-decay, beta1 beta1, beta2 beta2, max_grad_norm max-grad-norm
training: steps epochs, seed global-seed, mixed_precision mixed-precision, grad_precision grad-precision,
  dropout_mode sample-model-mode
parallel: data_parallel data-parallel
checkpoint: interval ckpt-every, dir ckpt-dir, sharded ckpt-sharded
metrics: wandb use-wandb, wandb_project wandb-project, wandb_entity wandb-entity, wandb_run_name wandb-run-name,
  image_interval log-image-every, interval log-interval
"""

REFERENCE_FLAGS: Mapping[str, str] = {
    f"--{flag}": f"{section}.{key}"
    for section, pairs in re.findall(r"^(\w+):(.*(?:\n  .*)*)", _TABLE, re.MULTILINE)
    for key, flag in map(str.split, pairs.split(","))
}
"""Flag of the reference trainer -> the key that it sets as it is."""


class Unavailable(Section):
    """Flags of rewards that do not exist here yet: accepted at the reference's defaults only."""

    reward_perceptual_weight: FiniteFloat = 0.0
    """Weight of minus LPIPS."""
    reward_use_gan: bool = False
    """Reward by a PatchGAN discriminator."""
    reward_gan_weight: FiniteFloat = 1.0
    """Its weight."""
    reward_disc_dim: PositiveInt = 64
    """Its width."""
    reward_disc_num_layers: PositiveInt = 3
    """Its depth."""
    reward_disc_ckpt: str | None = None
    """Its weights."""


class Translated(Section):
    """Flags that are turned into other keys. The reference's batch sizes are those of one process, of WORLD_SIZE."""

    sample_batch_size: PositiveInt = 32
    """Images of one rollout on each rank."""
    train_batch_size: PositiveInt = 8
    """Completions of one forward and backward on each rank."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forwards and backwards of one optimizer step."""
    reward_use_embedcos: bool = False
    """Switch of the reward embedding_cosine: while it is off, --reward-embedcos-weight is 0."""


TRANSLATED, UNAVAILABLE = "translated", "unavailable"
SECTIONS: Mapping[str, type[Section]] = {TRANSLATED: Translated, UNAVAILABLE: Unavailable}
"""These two as sections, which are no part of a recipe."""


def flag_of(name: str) -> str:
    """The flag of a key of these sections."""
    return f"--{name.replace('_', '-')}"


ALL_FLAGS: Mapping[str, str] = {
    **REFERENCE_FLAGS,
    **{flag_of(name): f"{title}.{name}" for title, section in SECTIONS.items() for name in section.model_fields},
}
"""Flag of the reference trainer -> its key, in a recipe or in one of the sections above."""

BATCH_TARGETS: Mapping[str, tuple[str, ...]] = {
    "sample_batch_size": ("rollout.batch_size",),
    "train_batch_size": ("training.batch_size", "training.micro_batch_size"),
    "gradient_accumulation_steps": ("training.batch_size",),
}
"""Keys of the whole batch that the reference's batch flags set, which count on each rank."""


def batch_keys(given: Mapping[str, int]) -> dict[str, tuple[int, dict[str, tuple[str, int]]]]:
    """Keys of the whole batch for the reference's batch flags and its defaults for those that are not given.

    Returns:
        Key -> its value, and the flags that it comes from: name -> flag, value.
    """
    values = Translated.model_validate(dict(given))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    numbers = {
        "rollout.batch_size": values.sample_batch_size * ranks,
        "training.batch_size": values.train_batch_size * values.gradient_accumulation_steps * ranks,
        "training.micro_batch_size": values.train_batch_size,
    }
    sources = {
        key: {n: (flag_of(n), getattr(values, n)) for n, targets in BATCH_TARGETS.items() if key in targets}
        for key in numbers
    }
    return {key: (number, sources[key]) for key, number in numbers.items()}


def rivals(key: str) -> list[tuple[str, str]]:
    """What may not be given beside a key, itself included: (the key that both set, the key of the other flag)."""
    batch = {f"{TRANSLATED}.{name}": targets for name, targets in BATCH_TARGETS.items()}
    targets = batch.get(key, (key,))
    pairs = [(targets[0], key), *((target, target) for target in targets)]
    return pairs + [(key, other) for other, set_keys in batch.items() if key in set_keys]


def is_embedding_cosine_off(switch: bool | None, flags: Collection[str], tables: Collection[str]) -> bool:
    """Whether the reference would leave out the reward of --reward-embedcos-weight.

    Args:
        switch: --reward-use-embedcos, None where it is not given.
        flags: the reference's flags that are given.
        tables: rewards of the recipe's file, which need no switch.
    """
    if "--reward-embedcos-weight" not in flags and "embedding_cosine" not in tables:
        return False
    return not switch if switch is not None else "embedding_cosine" not in tables
