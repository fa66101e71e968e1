"""Sampling every position of an image at once, under the codes of a real one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grpo.config import Rollout, Schedule
from grpo.data import ImageBatch
from grpo.kernels import Draw, philox_uniform
from grpo.rollout.random_streams import RandomStream
from grpo.rollout.scoring import score_targets
from grpo.rollout.trajectory import Scores, Trajectory


class TeacherForcedRollout:
    """G completions of each image, drawn from one row of logits per position in one pass.

    Where the schedule trains on the sampling forward, what is drawn is scored from the same logits, with gradient
    (`Trajectory.scores`), so that the update needs no forward of its own.

    Args:
        model: an image generator.
        encode: images -> codes [B, T], by the frozen tokenizer.
        config: the rollout section.
        draw: how tokens are drawn.
        schedule: sizes of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: Callable[[ImageBatch], Tensor],
        config: Rollout,
        *,
        draw: Draw,
        schedule: Schedule,
    ) -> None:
        self.model, self.encode, self.config, self.draw, self.schedule = model, encode, config, draw, schedule

    def __call__(self, batch: ImageBatch) -> Trajectory:
        """[B] images -> Trajectory with R = B rows, M = G."""
        codes = self.encode(batch)  # [B, T]
        context = perturb(
            codes[:, :-1],
            batch.sample_ids,
            share=self.config.context_noise_share,
            vocab_size=self.model.config.vocab_size,
            seed=self.draw.seed,
        )
        with torch.set_grad_enabled(self.schedule.trains_sampling_forward):
            hidden = self.model.hidden(context, batch.condition).flatten(0, 1)  # [B*T, D]
            tokens, log_probs, kept_mass, scores = self._sample(hidden, batch.sample_ids, codes)
        group = torch.arange(self.schedule.group_size, device=codes.device)
        return Trajectory(
            condition=batch.condition,
            context=context,
            tokens=tokens,
            old_log_probs=log_probs.detach(),
            target_tokens=codes,
            kept_mass=kept_mass[:, None].expand_as(log_probs) if self.draw.truncates else None,
            completion_ids=batch.sample_ids[:, None] * self.schedule.group_size + group,
            scores=scores,
        )

    def _sample(
        self, hidden: Tensor, sample_ids: Tensor, codes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Scores | None]:
        """hidden [B*T, D] -> tokens and log-probs [B, G, T], kept mass [B, T], scores with the graph of `hidden`."""
        weight, (rows, length) = self.model.output.weight, codes.shape
        row_ids = (sample_ids[:, None] * length + torch.arange(length, device=codes.device)).flatten()
        chosen = {"row_ids": row_ids, "num_samples": self.schedule.group_size}

        def by_image(values: Tensor) -> Tensor:
            return values.view(rows, length, -1).transpose(1, 2).contiguous()

        if not self.schedule.trains_sampling_forward:
            tokens, log_probs, kept_mass = self.draw.sample_projection(hidden, weight, **chosen)
            return by_image(tokens), by_image(log_probs), kept_mass.view(rows, length), None
        free_targets = codes.flatten() if self.draw.temperature == 1.0 else None  # they come with the same logits
        sample = self.draw.sample_and_score(hidden, weight, targets=free_targets, **chosen)
        target_log_probs = sample.target_log_probs
        if target_log_probs is None and self.schedule.scores_targets:
            target_log_probs = score_targets(self.model, hidden, codes, draw=self.draw)
        scores = Scores(
            by_image(sample.log_probs),
            sample.entropy.view(rows, length),
            None if target_log_probs is None else target_log_probs.reshape(rows, length),
        )
        return by_image(sample.tokens), scores.log_probs, sample.kept_mass.view(rows, length), scores


def perturb(context: Tensor, sample_ids: Tensor, *, share: float, vocab_size: int, seed: int) -> Tensor:
    """Replace a share of the context [B, T-1] by uniform random codes, a function of seed and sample ids only."""
    if share == 0.0:
        return context
    length = context.shape[1]
    uniform = philox_uniform(sample_ids, 2 * length, seed=seed, step=RandomStream.CONTEXT_NOISE)  # [B, 2(T-1)]
    random_codes = (uniform[:, length:] * vocab_size).long().clamp_(max=vocab_size - 1)
    return torch.where(uniform[:, :length] < share, random_codes, context)
