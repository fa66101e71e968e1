"""The policy update: clipped ratio, KL, cross-entropy and entropy, in micro-batches of shared contexts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from grpo.config import Objective, Rollout, Schedule
from grpo.kernels import Draw, philox_uniform
from grpo.objectives import policy_loss, token_weights
from grpo.parallel import MetricSums, gradient_sync
from grpo.rollout import RandomStream, Scores, Trajectory, score
from grpo.training.optimizer import GuardedOptimizer


class PolicyUpdate:
    """Optimizer steps on trajectories.

    Where a rollout feeds one optimizer step, the policy that sampled is the policy that is trained: old log-probs are
    the new ones, detached, and a teacher-forced rollout may hand over its own scores. Otherwise the rollout is cut into
    several optimizer steps, and old log-probs are scored first, by the same function as the new ones.

    The loss of one optimizer step is divided by global counts, so neither the number of ranks nor the micro-batch size
    changes the gradient.

    Args:
        policy: the parallelized model.
        optimizer: of the policy.
        objective, rollout: sections of the recipe.
        draw: the distribution that the rollouts sample from.
        schedule: sizes of the step.
        reference: the frozen reference where there is a KL term.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: GuardedOptimizer,
        *,
        objective: Objective,
        rollout: Rollout,
        draw: Draw,
        schedule: Schedule,
        reference: nn.Module | None = None,
    ) -> None:
        self.policy, self.optimizer, self.reference = policy, optimizer, reference
        self.objective, self.rollout, self.draw, self.schedule = objective, rollout, draw, schedule
        self._pending = 0  # completions whose gradient waits for the optimizer step

    def __call__(self, trajectory: Trajectory) -> MetricSums:
        """Backward of a rollout or a part of one, with every optimizer step that this completes.

        Args:
            trajectory: with advantages; its log-probs of before the first step are filled in here.

        Returns:
            The metrics of the loss and of the steps.
        """
        metrics, ranks = MetricSums(), self.schedule.ranks
        self._score_before(trajectory)
        for share in self._plan(trajectory):
            self._pending += sum(part.num_completions for part in share.parts)
            complete = self._pending == self.schedule.completions_per_step
            for part in share.parts:
                gradient_sync(self.policy, complete and part is share.parts[-1])
                loss = self._loss(part, share, metrics)
                metrics.add("loss", loss, 0)
                self.optimizer.backward(loss * ranks)  # gradients are averaged over ranks, the loss is a sum
            if complete:
                self._pending = 0
                metrics.add("loss", 0.0, 1 / ranks)
                for name, value in self.optimizer.step().items():
                    metrics.add(name, value)
        return metrics

    def _score_before(self, trajectory: Trajectory) -> None:
        """Fill in the log-probs that the loss compares with."""
        if self.reference is not None:
            trajectory.ref_log_probs = self.score(self.reference, trajectory)
        if not self.schedule.on_policy:
            trajectory.old_log_probs = self.score(self.policy, trajectory)

    @torch.no_grad()
    def score(self, model: nn.Module, trajectory: Trajectory) -> Tensor:
        """Log-probs [R, M, T] of a trajectory under any model, by the definition and batch size of the update."""
        bare = replace(trajectory, scores=None, target_tokens=None)
        return torch.cat([self._score(model, part).log_probs for part in bare.split(self.schedule.micro_batch_size)])

    def _score(self, model: nn.Module, part: Trajectory) -> Scores:
        return score(model, part, draw=self.draw, cfg_scale=self.rollout.loss_cfg_scale)

    def _plan(self, trajectory: Trajectory) -> list["_Share"]:
        """Cut a trajectory into optimizer steps and those into micro-batches."""
        per_step, micro_batch = self.schedule.completions_per_step, self.schedule.micro_batch_size
        per_row, real = trajectory.tokens.shape[1], trajectory.real
        if not self.schedule.scores_targets and self.draw.temperature != 1.0:
            trajectory = replace(trajectory, target_tokens=None)  # scoring it would cost a pass, only to be logged
        if self.schedule.on_policy:
            cuts = [trajectory]
        elif per_step >= per_row:
            cuts = trajectory.split(per_step // per_row)
        else:
            cuts = [
                row.select(slice(None), slice(start, start + per_step))
                for row in trajectory.split(1)
                for start in range(0, per_row, per_step)
            ]
        rows = max(1, per_step // per_row)
        shares = [_Share(cut.split(micro_batch), rows=rows, target_rows=rows) for cut in cuts]
        if real is not None:
            bounds = [index * real.rows // len(shares) for index in range(len(shares) + 1)]
            for share, start, stop in zip(shares, bounds, bounds[1:], strict=False):
                share.target_rows = stop - start
                share.parts += real.select(slice(start, stop)).split(micro_batch)
        return shares

    def _loss(self, part: Trajectory, share: "_Share", metrics: MetricSums) -> Tensor:
        """This micro-batch's part of the optimizer step's loss, already divided by the step's global counts."""
        scores = self._score(self.policy, part) if part.scores is None else part.scores
        length, ranks = part.tokens.shape[-1], self.schedule.ranks
        loss = scores.log_probs.new_zeros(())
        if part.num_completions:
            loss = loss + self._policy_loss(part, scores.log_probs, metrics)
            if self.objective.entropy_weight:  # a weight of 0 would still cost a pass over the logits
                entropy = scores.entropy.sum() / (share.rows * length * ranks)
                loss = loss - self.objective.entropy_weight * entropy
            metrics.add("entropy", scores.entropy.sum(), scores.entropy.numel())
        if scores.target_log_probs is not None:
            cross_entropy = -scores.target_log_probs.sum()
            loss = loss + self.objective.aux_ce_weight * cross_entropy / (share.target_rows * length * ranks)
            metrics.add("aux_ce", cross_entropy, scores.target_log_probs.numel())
        return loss

    def _policy_loss(self, part: Trajectory, log_probs: Tensor, metrics: MetricSums) -> Tensor:
        objective = self.objective
        weights = token_weights(
            tuple(log_probs.shape),
            loss=objective.loss,
            sequences=self.schedule.completions_per_step * self.schedule.ranks,
            keep=self._kept_tokens(part),
            keep_probability=1 - objective.token_dropout_share,
            device=log_probs.device,
        )
        if part.kept_mass is not None and self.rollout.importance_weight_cap:
            # drawn from p / kept mass on the kept set: p / (p / mass) = mass
            weights = weights * part.kept_mass.clamp(max=self.rollout.importance_weight_cap)
        loss, sums = policy_loss(
            log_probs,
            log_probs.detach() if self.schedule.on_policy else part.old_log_probs,
            part.advantages,
            loss=objective.loss,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            weights=weights,
            ref_log_probs=part.ref_log_probs,
            kl=objective.kl_estimator,
            kl_coef=objective.kl_coef,
            impl=self.draw.impl,
        )
        _observe(part, log_probs.detach(), sums, metrics)
        return loss

    def _kept_tokens(self, part: Trajectory) -> Tensor | None:
        """[R, M, T] bool, drawn per completion from the seed; at least one token of each stays."""
        share = self.objective.token_dropout_share
        if share == 0.0:
            return None
        ids, length = part.completion_ids.flatten(), part.tokens.shape[-1]
        keep = philox_uniform(ids, length, seed=self.draw.seed, step=RandomStream.TOKEN_DROPOUT) >= share
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


def _observe(part: Trajectory, log_probs: Tensor, sums: dict[str, Tensor], metrics: MetricSums) -> None:
    ratios = sums.get("sequences", sums["tokens"])
    metrics.add("ratio", sums["ratio"], ratios)
    metrics.add("clip_low", sums["clipped_low"], ratios)
    metrics.add("clip_high", sums["clipped_high"], ratios)
    metrics.add("clip_fraction", sums["outside"], ratios)
    if part.ref_log_probs is not None:
        metrics.add("kl", sums["kl_ref"], sums["tokens"])
    # On-policy the clipped surrogate is minus the mean advantage, 0 by construction; this one is not.
    metrics.add("surrogate", -(part.advantages[..., None] * log_probs).sum(), log_probs.numel())
    metrics.add("old_log_prob_gap", (log_probs - part.old_log_probs).abs().sum(), log_probs.numel())
    if part.kept_mass is not None:
        metrics.add("kept_mass", part.kept_mass.sum(), part.kept_mass.numel())
