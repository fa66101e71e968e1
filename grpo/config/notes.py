"""Settings that have no effect next to the others: worth a line to the user, not an error."""

from collections.abc import Sequence

from grpo.config.job_sections import Evaluation, Sampling, TokenizerLoss
from grpo.config.reward_sections import Rewards
from grpo.config.sections import (
    Checkpoint,
    Metrics,
    Model,
    Objective,
    Optimizer,
    Rollout,
    Section,
    Tokenizer,
)


def training_notes(optimizer: Optimizer, checkpoint: Checkpoint, metrics: Metrics) -> list[str]:
    """Optimizer, checkpoints and Weights & Biases."""
    idle = []
    if optimizer.schedule == "one_cycle" and optimizer.warmup_steps:
        idle.append(("optimizer.warmup_steps", "one_cycle has its own warm-up"))
    if checkpoint.keep_best and not checkpoint.keep_last:
        idle.append(("checkpoint.keep_best", "checkpoint.keep_last = 0 keeps all"))
    if not checkpoint.keep_best:
        idle += [(f"checkpoint.{key}", "checkpoint.keep_best is 0") for key in changed(checkpoint) if "best_" in key]
    if not metrics.wandb:
        idle += [(f"metrics.{key}", "metrics.wandb is off") for key in changed(metrics) if key.startswith("wandb_")]
    notes = _without_effect(idle)
    if not checkpoint.save_final and not checkpoint.interval:
        notes.append("checkpoint.interval = 0 and checkpoint.save_final = false: nothing of this run is saved")
    return notes


def grpo_notes(rollout: Rollout, objective: Objective, rewards: Rewards) -> list[str]:
    """Switches of the rollout and of the objective that are off, or that the others make void."""
    idle = []
    if objective.kl_estimator == "none":
        off = 'the KL term is off (objective.kl = "none")'
        idle += [(f"objective.{key}", off) for key in changed(objective) if key in ("kl_coef", "reference_checkpoint")]
    if not objective.use_token_dropout and "token_dropout" in changed(objective):
        idle.append(("objective.token_dropout", "objective.use_token_dropout is off"))
    if not rollout.use_context_noise and "context_noise" in changed(rollout):
        idle.append(("rollout.context_noise", "rollout.use_context_noise is off"))
    if rollout.importance_weight_cap and not rollout.top_k and rollout.top_p == 1:
        idle.append(("rollout.importance_weight_cap", "neither top_k nor top_p truncates the draw"))
    if rollout.guidance_in_loss == "conditional" and rollout.cfg_scale == 1:
        idle.append(("rollout.guidance_in_loss", "guidance is off (rollout.cfg_scale = 1)"))
    if rollout.max_rows and rollout.mode == "teacher_forced":
        idle.append(("rollout.max_rows", "teacher-forced rollouts have no cache"))
    idle += [(f"reward.{name}", "its weight is 0") for name in rewards.tables if name not in rewards.active]
    if objective.advantage == "gdpo" and len(rewards.active) == 1:
        idle.append(('objective.advantage = "gdpo"', "with one reward it is group_std"))
    return _without_effect(idle)


def tokenizer_notes(loss: TokenizerLoss) -> list[str]:
    """Settings of the moving average where the codebook is trained by gradient."""
    if loss.codebook_update == "ema":
        return []
    keys = [key for key in changed(loss) if key in ("codebook_ema", "restart_threshold")]
    return _without_effect([(f"tokenizer_loss.{key}", 'codebook_update is "gradient"') for key in keys])


def evaluation_notes(evaluation: Evaluation, sampling: Sampling, model: Model, tokenizer: Tokenizer) -> list[str]:
    """Settings of sampling where images are given."""
    if evaluation.images is None:
        return []
    idle = [f"sampling.{key}" for key in changed(sampling)]
    idle += [f"{name}.checkpoint" for name, part in (("model", model), ("tokenizer", tokenizer)) if part.checkpoint]
    return _without_effect([(key, "evaluation.images are not drawn from a model") for key in idle])


def changed(section: Section) -> list[str]:
    """Keys of a section that are not at their defaults."""
    default = type(section)()
    return [key for key in type(section).model_fields if getattr(section, key) != getattr(default, key)]


def _without_effect(idle: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{key} has no effect: {reason}" for key, reason in idle]
