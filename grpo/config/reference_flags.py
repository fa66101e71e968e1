"""The flags of the reference trainer, and what they mean in keys."""

import re
from collections.abc import Mapping

from grpo.config.types import PositiveInt, Section

_TABLE = """
model: name gpt-model, checkpoint gpt-ckpt, from_fsdp from-fsdp, num_classes num-classes, cls_token_num cls-token-num,
  class_dropout uncond-prob, dropout dropout-p, token_dropout token-dropout-p
text: llamagen_features t5-feat-path, llamagen_short_features short-t5-feat-path
tokenizer: name vq-model, checkpoint vq-ckpt, codebook_size codebook-size, codebook_embed_dim codebook-embed-dim,
  downsample_size downsample-size
data: name dataset, path data-path, image_size image-size, num_workers num-workers,
  first_list data-start, last_list data-end
rollout: batch_size sample-batch-size, num_generations num-generations, temperature temperature, top_k top-k,
  top_p top-p, use_context_noise use-token-noise, context_noise token-noise-prob
reward: reconstruction.distance reward-rec-type, reconstruction.weight reward-rec-weight,
  embedding_cosine.weight reward-embedcos-weight, lpips.weight reward-perceptual-weight,
  patchgan.weight reward-gan-weight, patchgan.dim reward-disc-dim, patchgan.num_layers reward-disc-num-layers,
  patchgan.checkpoint reward-disc-ckpt
objective: advantage_clip adv-clip-max, clip_range clip-range, aux_ce_weight aux-ce-weight, use_kl_loss use-kl-loss,
  kl_coef kl-coef, reference_checkpoint kl-base-ckpt, use_token_dropout use-token-dropout,
  token_dropout token-dropout-ratio
optimizer: lr lr, weight_decay weight-decay, beta1 beta1, beta2 beta2, max_grad_norm max-grad-norm
training: micro_batch_size train-batch-size, steps epochs, seed global-seed, mixed_precision mixed-precision,
  grad_precision grad-precision, dropout_mode sample-model-mode
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


class ReferenceOnly(Section):
    """Flags of the reference trainer that are no keys of a recipe."""

    gradient_accumulation_steps: PositiveInt = 1
    """Forwards and backwards of --train-batch-size completions in one optimizer step."""
    reward_use_embedcos: bool = False
    """Switch of the reward embedding_cosine: while it is off, --reward-embedcos-weight is 0."""
    reward_use_gan: bool = False
    """Switch of the reward patchgan: while it is off, --reward-gan-weight is 0."""


SECTIONS: Mapping[str, type[Section]] = {"reference": ReferenceOnly}
"""The section of these, which is no part of a recipe."""

ALL_FLAGS: Mapping[str, str] = {
    **REFERENCE_FLAGS,
    **{f"--{key.replace('_', '-')}": f"{name}.{key}" for name, part in SECTIONS.items() for key in part.model_fields},
}
"""Flag of the reference trainer -> its key, in a recipe or in the section above."""

SWITCHES: Mapping[str, tuple[str, float]] = {
    "--reward-use-embedcos": ("embedding_cosine", 0.0),
    "--reward-use-gan": ("patchgan", 1.0),
}
"""Flag that switches a reward on -> the reward, and its weight where no other flag gives one."""

DROPOUT_RATE = 0.1
"""Of the reference's dropouts, where its update has them and no flag says otherwise."""

TEXT_FLAGS = ("--t5-feat-path", "--short-t5-feat-path")
"""Flags of its text-to-image trainer that select that one's defaults, as --cls-token-num above 1 does."""

TEXT_MODEL: Mapping[str, int] = {"model.cls_token_num": 120, "model.caption_dim": 2048}
"""Keys of the model under these flags, unless they are set."""

TEXT_COMMAND: Mapping[str, float] = {"data.image_size": 384, "reward.lpips.weight": 1.0}
"""Other defaults of its text-to-image trainer, of a command line without a recipe file."""

BATCH_FLAGS: Mapping[str, Mapping[str, int]] = {
    "rollout.batch_size": {"--sample-batch-size": 32},
    "training.batch_size": {"--train-batch-size": 8, "--gradient-accumulation-steps": 1},
}
"""Keys of a whole batch -> the flags whose product is the share of one process, and the reference's defaults."""
