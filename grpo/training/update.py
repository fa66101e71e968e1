"""The policy update: clipped ratio, KL, cross-entropy and entropy, in micro-batches of shared contexts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from grpo.config import GRPORecipe, Objective, Rollout, Training
from grpo.kernels import philox_uniform
from grpo.objectives import policy_loss, token_weights
from grpo.parallel import World, grad_scaler, gradient_sync
from grpo.rollout import Scores, Trajectory, score
from grpo.training.metrics import MetricSums
from grpo.training.optimizer import OptimizerStep

DROPOUT_STREAM = 2  # `step` of the generator for token dropout; see grpo.rollout for the others


class PolicyUpdate:
    """Optimizer steps on trajectories.

    An optimizer step takes `training.batch_size * gradient_accumulation_steps` completions of this rank. When that is
    the whole rollout, the policy that sampled is the policy that is trained: old log-probs are the new ones, detached,
    and a teacher-forced rollout may hand over its own scores (`shares_forward`). Otherwise the rollout is cut into
    several optimizer steps, and old log-probs are scored first, by the same function as the new ones.

    The loss of one optimizer step is divided by global counts, so neither the number of ranks nor the micro-batch size
    changes the gradient.
    """

    def __init__(
        self,
        policy: nn.Module,
        step: OptimizerStep,
        *,
        objective: Objective,
        rollout: Rollout,
        training: Training,
        world: World,
    ) -> None:
        self.policy, self.step, self.objective, self.rollout = policy, step, objective, rollout
        self.micro_batch, self.seed, self.impl = training.batch_size, training.seed, training.kernels
        self.world = world
        self.completions_per_step, self.steps_per_rollout = optimizer_steps(rollout, training)
        self.on_policy = self.steps_per_rollout == 1
        self.cfg_scale = rollout.cfg_scale if rollout.guidance_in_loss == "guided" else 1.0
        self.metrics = MetricSums()
        self._pending = 0  # completions whose gradient waits for the optimizer step

    @property
    def shares_forward(self) -> bool:
        """Whether a teacher-forced rollout should keep its graph and come in parts of `micro_batch` images.

        A scale over the whole batch needs all rewards before the first backward.
        """
        return self.on_policy and can_share_forward(self.objective, self.rollout)

    @property
    def images_per_part(self) -> int:
        """Images of one rollout call: a micro-batch when its forward is trained on, else the whole rollout."""
        return self.micro_batch if self.shares_forward else self.rollout.batch_size

    def prepare(self, trajectory: Trajectory, reference: nn.Module | None) -> None:
        """Fill in the log-probs that the loss needs and that do not depend on rewards: those before the first step.

        Args:
            trajectory: of a rollout or a part of one.
            reference: the frozen reference where there is a KL term.
        """
        if reference is not None:
            trajectory.ref_log_probs = self.score(reference, trajectory)
        if not self.on_policy:
            trajectory.old_log_probs = self.score(self.policy, trajectory)

    def __call__(self, trajectory: Trajectory) -> None:
        """Backward of a rollout or a part of one, with every optimizer step that this completes.

        Args:
            trajectory: prepared, and with advantages.
        """
        for share in self._plan(trajectory):
            self._pending += sum(part.completions for part in share.parts)
            complete = self._pending == self.completions_per_step
            for index, part in enumerate(share.parts):
                gradient_sync(self.policy, complete and index == len(share.parts) - 1)
                loss = self._loss(part, share)
                self.metrics.add("loss", loss, 0)
                self.step.backward(loss * self.world.size)  # gradients are averaged over ranks, the loss is a sum
            if complete:
                self._pending = 0
                self.metrics.add("loss", 0.0, 1 / self.world.size)
                for name, value in self.step().items():
                    self.metrics.add(name, value)

    @torch.no_grad()
    def score(self, model: nn.Module, trajectory: Trajectory) -> Tensor:
        """Log-probs [R, M, T] of a trajectory under any model, by the definition and batch size of the update."""
        bare = replace(trajectory, scores=None, target_tokens=None)
        return torch.cat([self._score(model, part).log_probs for part in bare.split(self.micro_batch)])

    def _score(self, model: nn.Module, part: Trajectory) -> Scores:
        return score(model, part, temperature=self.rollout.temperature, cfg_scale=self.cfg_scale, impl=self.impl)

    def _plan(self, trajectory: Trajectory) -> list["_Share"]:
        """Cut a trajectory into optimizer steps and those into micro-batches."""
        per_row, real = trajectory.tokens.shape[1], trajectory.real
        if not self.objective.aux_ce_weight and self.rollout.temperature != 1.0:
            trajectory = replace(trajectory, target_tokens=None)  # scoring it would cost a pass, only to be logged
        if self.on_policy:
            cuts = [trajectory]
        elif self.completions_per_step >= per_row:
            cuts = trajectory.split(self.completions_per_step // per_row)
        else:
            cuts = [
                row.select(slice(None), slice(start, start + self.completions_per_step))
                for row in trajectory.split(1)
                for start in range(0, per_row, self.completions_per_step)
            ]
        rows = max(1, self.completions_per_step // per_row)
        shares = [_Share(cut.split(self.micro_batch), rows=rows, target_rows=rows) for cut in cuts]
        if real is not None:
            bounds = [index * real.rows // len(shares) for index in range(len(shares) + 1)]
            for share, start, stop in zip(shares, bounds, bounds[1:], strict=False):
                share.target_rows = stop - start
                share.parts += real.select(slice(start, stop)).split(self.micro_batch)
        return shares

    def _loss(self, part: Trajectory, share: "_Share") -> Tensor:
        """This micro-batch's part of the optimizer step's loss, already divided by the step's global counts."""
        scores = self._score(self.policy, part) if part.scores is None else part.scores
        length = part.tokens.shape[-1]
        loss = scores.log_probs.new_zeros(())
        if part.completions:
            loss = loss + self._policy_loss(part, scores.log_probs)
            if self.objective.entropy_weight:  # a weight of 0 would still cost a pass over the logits
                entropy = scores.entropy.sum() / (share.rows * length * self.world.size)
                loss = loss - self.objective.entropy_weight * entropy
            self.metrics.add("entropy", scores.entropy.sum(), scores.entropy.numel())
        if scores.target_log_probs is not None:
            cross_entropy = -scores.target_log_probs.sum()
            tokens = share.target_rows * length * self.world.size
            loss = loss + self.objective.aux_ce_weight * cross_entropy / tokens
            self.metrics.add("aux_ce", cross_entropy, scores.target_log_probs.numel())
        return loss

    def _policy_loss(self, part: Trajectory, log_probs: Tensor) -> Tensor:
        objective = self.objective
        old_log_probs = log_probs.detach() if self.on_policy else part.old_log_probs
        keep = self._kept_tokens(part)
        weights = token_weights(
            tuple(log_probs.shape),
            loss=objective.loss,
            sequences=self.completions_per_step * self.world.size,
            keep=keep,
            keep_probability=1 - objective.token_dropout_share,
            device=log_probs.device,
        )
        if part.kept_mass is not None and self.rollout.importance_weight_cap:
            # drawn from p / kept mass on the kept set: p / (p / mass) = mass
            weights = weights * part.kept_mass.clamp(max=self.rollout.importance_weight_cap)
        loss, sums = policy_loss(
            log_probs,
            old_log_probs,
            part.advantages,
            loss=objective.loss,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            weights=weights,
            ref_log_probs=part.ref_log_probs,
            kl=objective.kl_estimator,
            kl_coef=objective.kl_coef,
            impl=self.impl,
        )
        self._observe(part, log_probs.detach(), sums)
        return loss

    def _observe(self, part: Trajectory, log_probs: Tensor, sums: dict[str, Tensor]) -> None:
        ratios = sums.get("sequences", sums["tokens"])
        self.metrics.add("ratio", sums["ratio"], ratios)
        self.metrics.add("clip_low", sums["clipped_low"], ratios)
        self.metrics.add("clip_high", sums["clipped_high"], ratios)
        self.metrics.add("clip_fraction", sums["outside"], ratios)
        if part.ref_log_probs is not None:
            self.metrics.add("kl", sums["kl_ref"], sums["tokens"])
        # On-policy the clipped surrogate is minus the mean advantage, 0 by construction; this one is not.
        self.metrics.add("surrogate", -(part.advantages[..., None] * log_probs).sum(), log_probs.numel())
        self.metrics.add("old_log_prob_gap", (log_probs - part.old_log_probs).abs().sum(), log_probs.numel())
        if part.kept_mass is not None:
            self.metrics.add("kept_mass", part.kept_mass.sum(), part.kept_mass.numel())

    def _kept_tokens(self, part: Trajectory) -> Tensor | None:
        """[R, M, T] bool, drawn per completion from the seed; at least one token of each stays."""
        share = self.objective.token_dropout_share
        if share == 0.0:
            return None
        ids = part.completion_ids.flatten()
        uniform = philox_uniform(ids, part.tokens.shape[-1], seed=self.seed, step=DROPOUT_STREAM)
        keep = uniform >= share
        keep[:, 0] |= ~keep.any(dim=1)
        return keep.view(part.tokens.shape)


@dataclass
class _Share:
    """What one optimizer step takes of a trajectory."""

    parts: list[Trajectory]
    """Micro-batches."""
    rows: int
    """Contexts of the whole optimizer step on this rank."""
    target_rows: int
    """Contexts with targets of the whole optimizer step on this rank."""


def build_update(recipe: GRPORecipe, policy: nn.Module, world: World) -> PolicyUpdate:
    """The update of a recipe, with its optimizer."""
    _, steps_per_rollout = optimizer_steps(recipe.rollout, recipe.training)
    step = OptimizerStep(
        policy,
        recipe.optimizer,
        total_steps=recipe.training.steps * steps_per_rollout,
        max_skipped_steps=recipe.training.max_skipped_steps,
        scaler=grad_scaler(recipe.training.mixed_precision, world.device),
    )
    return PolicyUpdate(
        policy, step, objective=recipe.objective, rollout=recipe.rollout, training=recipe.training, world=world
    )


def can_share_forward(objective: Objective, rollout: Rollout) -> bool:
    """Whether a rollout that feeds one optimizer step can hand over its own forward, see `shares_forward`."""
    return rollout.mode == "teacher_forced" and objective.advantage != "batch_std"


def optimizer_steps(rollout: Rollout, training: Training) -> tuple[int, int]:
    """(completions of one optimizer step, optimizer steps of one rollout), both on one rank."""
    completions = training.batch_size * training.gradient_accumulation_steps
    return completions, rollout.batch_size * rollout.num_generations // completions
