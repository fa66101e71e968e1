"""The policy update: clipped ratio, KL, cross-entropy and entropy, in micro-batches of shared contexts."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from grpo.config import Objective, Rollout, Schedule
from grpo.kernels import Draw, RandomStream, philox_uniform
from grpo.objectives import EntropyControl, highest_entropy, policy_loss, token_weights
from grpo.parallel import MetricSums, gradient_sync
from grpo.position import counted
from grpo.rollout import Scores, Trajectory, score
from grpo.training.optimizer import GuardedOptimizer


class PolicyUpdate:
    """Optimizer steps on trajectories.

    Where a rollout feeds one optimizer step, the policy that sampled is the policy that is trained: old log-probs are
    the new ones, detached, and a teacher-forced rollout may hand over its own scores. Otherwise the rollout is cut into
    several optimizer steps, or gone through several times in the same order, and old log-probs are scored first, by the
    same function as the new ones. So are those of the reference, also of one that moves with each optimizer step.

    An optimizer step passes over its batch with dropout, without, or both ways, whose mean is then its loss. New, old
    and reference log-probs of a pass have the same masks, which depend on a row's number only: the ratio of a policy
    that has not changed is 1, and a KL compares models, not masks.

    The loss of one optimizer step is divided by global counts, so neither the number of ranks nor the micro-batch size
    changes the gradient.

    Args:
        policy: the parallelized model.
        draw: the distribution that the rollouts sample from.
        reference: the reference where there is a KL term.

    Attributes:
        entropy_control: the weight of the entropy bonus; part of what a run goes on from.
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
        self._score = partial(score, draw=draw, cfg_scale=rollout.loss_cfg_scale)
        self.entropy_control = EntropyControl(objective, vocab_size=policy.config.vocab_size)
        self._pending = 0  # completions whose gradient waits for the optimizer step
        self._entropy = MetricSums()  # of their contexts

    def __call__(self, trajectory: Trajectory) -> MetricSums:
        """Backward of a rollout or a part of one, with every optimizer step that this completes; their metrics.

        Args:
            trajectory: with advantages; its log-probs of before the first step are filled in here.
        """
        metrics, ranks = MetricSums(), self.schedule.ranks
        passes = [self._one_pass(trajectory, drops) for drops in self.schedule.dropout_passes]
        steps = list(zip(*map(self._plan, passes), strict=True)) * self.schedule.epochs
        for planned in counted(steps, "optimizer step"):
            real_rows = sum(part.rows for part in planned[0] if not part.num_completions)
            self._pending += sum(part.num_completions for part in planned[0])
            parts = [part for one_pass in planned for part in one_pass]
            complete = self._pending == self.schedule.completions_per_step
            for part in counted(parts, "micro-batch"):
                gradient_sync(self.policy, complete and part is parts[-1])
                loss = self._loss(part, real_rows, metrics) / len(passes)
                metrics.add("loss", loss, 0)
                self.optimizer.backward(loss * ranks)  # gradients are averaged over ranks, the loss is a sum
            if complete:
                self._pending = 0
                metrics.add("loss", 0.0, 1 / ranks)
                for name, value in self.optimizer.step().items():
                    metrics.add(name, value)
                if self.entropy_control.steers:
                    metrics.add("entropy_weight", self.entropy_control.weight)
                    self.entropy_control.update(self._entropy.means()["entropy"])
        return metrics

    def _one_pass(self, trajectory: Trajectory, drops: bool) -> Trajectory:
        """The trajectory as one pass sees it: with log-probs of before the first step under the pass's own masks."""
        if drops:  # the scores of the rollout are without
            real = trajectory.real and replace(trajectory.real, drops=True)
            trajectory = replace(trajectory, drops=True, real=real, scores=None)
        if self.reference is not None:
            trajectory.ref_log_probs = self.score(self.reference, trajectory)
        if not self.schedule.on_policy:
            trajectory.old_log_probs = self.score(self.policy, trajectory)
        return trajectory

    @torch.no_grad()
    def score(self, model: nn.Module, trajectory: Trajectory) -> Tensor:
        """Log-probs [R, M, T] of a trajectory under any model, by the definition and batch size of the update."""
        bare = replace(trajectory, scores=None, target_tokens=None)
        return torch.cat([self._score(model, part).log_probs for part in bare.split(self.schedule.micro_batch_size)])

    def _plan(self, trajectory: Trajectory) -> list[list[Trajectory]]:
        """Cut a trajectory into optimizer steps and those into micro-batches."""
        per_step, per_row = self.schedule.completions_per_step, trajectory.tokens.shape[1]
        micro_batch, real = self.schedule.micro_batch_size, trajectory.real
        if not self.schedule.scores_targets and self.draw.temperature != 1.0:
            trajectory = replace(trajectory, target_tokens=None)  # scoring it would cost a pass, only to be logged
        steps = [
            contexts.select(slice(None), slice(start, start + per_step)).split(micro_batch)
            for contexts in trajectory.split(max(1, per_step // per_row))
            for start in range(0, per_row, per_step)  # more than one start where a group feeds several steps
        ]
        if real is not None:
            bounds = [index * real.rows // len(steps) for index in range(len(steps) + 1)]
            for parts, (start, stop) in zip(steps, pairwise(bounds), strict=True):
                parts += real.select(slice(start, stop)).split(micro_batch)
        return steps

    def _loss(self, part: Trajectory, real_rows: int, metrics: MetricSums) -> Tensor:
        """A micro-batch's share of the optimizer step's loss; `real_rows` contexts of the step have no completions."""
        scores = self._score(self.policy, part) if part.scores is None else part.scores
        _, completions, length = part.tokens.shape
        contexts = self.schedule.completions_per_step // completions if completions else real_rows
        tokens = contexts * length * self.schedule.ranks  # of all contexts like these in the optimizer step
        loss = scores.log_probs.new_zeros(())
        if completions:
            loss = loss + self._policy_loss(part, scores, metrics)
            if self.entropy_control.weight:  # a weight of 0 would still cost a pass over the logits
                loss = loss - self.entropy_control.weight * (scores.entropy.sum() / tokens)
            for sums in (metrics, self._entropy) if self.entropy_control.steers else (metrics,):
                sums.add("entropy", scores.entropy.sum(), scores.entropy.numel())
        if scores.target_log_probs is not None:
            cross_entropy = -scores.target_log_probs.sum()
            loss = loss + self.objective.aux_ce_weight * cross_entropy / tokens
            metrics.add("aux_ce", cross_entropy, scores.target_log_probs.numel())
        return loss

    def _policy_loss(self, part: Trajectory, scores: Scores, metrics: MetricSums) -> Tensor:
        objective, log_probs = self.objective, scores.log_probs
        keep, probability = self._kept_tokens(part, scores.entropy)
        kept = {"keep": keep, "keep_probability": probability}
        sequences, device = self.schedule.completions_per_step * self.schedule.ranks, log_probs.device
        weights = token_weights(log_probs.shape, loss=objective.loss, sequences=sequences, device=device, **kept)
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
            kl_level=objective.kl_level,
            impl=self.draw.impl,
        )
        log_probs, ratios = log_probs.detach(), sums["sequences" if objective.loss == "gspo" else "tokens"]
        metrics.add("ratio", sums["ratio"], ratios)
        metrics.add("clip_low", sums["clipped_low"], ratios)
        metrics.add("clip_high", sums["clipped_high"], ratios)
        metrics.add("clip_fraction", sums["outside"], ratios)
        if part.ref_log_probs is not None:
            metrics.add("kl", sums["kl_ref"], sums[f"{objective.kl_level}s"])
        # On-policy the clipped surrogate is minus the mean advantage, 0 by construction; this one is not.
        metrics.add("surrogate", -(part.advantages[..., None] * log_probs).sum(), log_probs.numel())
        metrics.add("old_log_prob_gap", (log_probs - part.old_log_probs).abs().sum(), log_probs.numel())
        if part.kept_mass is not None:
            metrics.add("kept_mass", part.kept_mass.sum(), part.kept_mass.numel())
        return loss

    def _kept_tokens(self, part: Trajectory, entropy: Tensor) -> tuple[Tensor | None, float]:
        """[R, M, T] bool, the tokens that the loss counts, None for all; and the share of tokens that are kept.

        By entropy a row has the same positions in all its completions. What dropout keeps is drawn per completion from
        the seed, at least one token of each.
        """
        share, length, keep, probability = self.objective.token_dropout_share, part.tokens.shape[-1], None, 1.0
        if share > 0.0:
            ids, stream = part.completion_ids.flatten(), RandomStream.TOKEN_DROPOUT
            keep = philox_uniform(ids, length, seed=self.draw.seed, step=stream, impl=self.draw.impl) >= share
            keep[:, 0] |= ~keep.any(dim=1)
            keep, probability = keep.view(part.tokens.shape), 1 - share
        if self.objective.entropy_token_share < 1.0:
            count = self.objective.positions_in_loss(length)
            chosen = highest_entropy(entropy, count)[:, None]  # [R, 1, T]
            keep = chosen.expand(part.tokens.shape) if keep is None else keep & chosen
            probability *= count / length
        return keep, probability
