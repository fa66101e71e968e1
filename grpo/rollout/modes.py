"""The two modes of rollout: B images, or what they are asked to be -> Trajectory."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grpo.config import Rollout, Sampling, Schedule
from grpo.data import ImageBatch
from grpo.kernels import Draw, RandomStream, philox_uniform
from grpo.models import Generator
from grpo.rollout.autoregressive import CodeSampler
from grpo.rollout.scoring import score_targets
from grpo.rollout.trajectory import Scores, Trajectory, real_rows


@dataclass
class RolloutMode(ABC):
    """What both modes are made of."""

    model: Generator
    encode: Callable[[ImageBatch], Tensor]  # images -> codes [B, T], by the frozen tokenizer
    config: Rollout
    draw: Draw
    schedule: Schedule

    @abstractmethod
    def __call__(self, batch: ImageBatch) -> Trajectory:
        """The trajectory of B images or conditions."""

    def completion_ids(self, batch: ImageBatch) -> Tensor:
        """[B, G] int64: global running numbers of the completions."""
        group = torch.arange(self.schedule.group_size, device=batch.sample_ids.device)
        return batch.sample_ids[:, None] * self.schedule.group_size + group


class TeacherForcedRollout(RolloutMode):
    """G completions of each image, drawn from one row of logits per position in one pass.

    Where the schedule trains on the sampling forward, what is drawn is scored from the same logits, with gradient
    (`Trajectory.scores`), so that the update needs no forward of its own.
    """

    def __call__(self, batch: ImageBatch) -> Trajectory:
        """[B] images -> Trajectory with R = B rows, M = G."""
        codes = self.encode(batch)  # [B, T]
        context = perturb(
            codes[:, :-1], batch.sample_ids, share=self.config.context_noise_share, seed=self.draw.seed,
            vocab_size=self.model.config.vocab_size, impl=self.draw.impl,
        )  # fmt: skip
        with torch.set_grad_enabled(self.schedule.trains_sampling_forward):
            hidden = self.model.hidden(context, batch.condition).flatten(0, 1)  # [B*T, D]
            tokens, log_probs, kept_mass, scores = self._sample(hidden, batch.sample_ids, codes)
        return Trajectory(
            condition=batch.condition,
            context=context,
            tokens=tokens,
            old_log_probs=log_probs.detach(),
            target_tokens=codes,
            kept_mass=kept_mass[:, None].expand_as(log_probs) if self.draw.truncates else None,
            row_ids=batch.sample_ids,
            completion_ids=self.completion_ids(batch),
            scores=scores,
        )

    def _sample(self, hidden: Tensor, ids: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Scores | None]:
        """hidden [B*T, D] -> tokens and log-probs [B, G, T], kept mass [B, T], scores with the graph of `hidden`."""
        weight, (rows, length) = self.model.output.weight, codes.shape
        row_ids = (ids[:, None] * length + torch.arange(length, device=codes.device)).flatten()
        chosen = {"row_ids": row_ids, "num_samples": self.schedule.group_size}

        def by_image(values: Tensor) -> Tensor:
            return values.view(rows, length, -1).transpose(1, 2).contiguous()

        if not self.schedule.trains_sampling_forward:
            tokens, log_probs, kept_mass = self.draw.sample_projection(hidden, weight, **chosen)
            return by_image(tokens), by_image(log_probs), kept_mass.view(rows, length), None
        free_targets = codes.flatten() if self.draw.temperature == 1.0 else None  # they come with the same logits
        sample = self.draw.sample_and_score(hidden, weight, targets=free_targets, **chosen)
        targets = sample.target_log_probs
        if targets is not None:
            targets = targets.reshape(rows, length)
        elif self.schedule.scores_targets:
            targets = score_targets(self.model, hidden, codes, draw=self.draw)
        scores = Scores(by_image(sample.log_probs), sample.entropy.view(rows, length), targets)
        return by_image(sample.tokens), scores.log_probs, sample.kept_mass.view(rows, length), scores


class AutoregressiveRollout(RolloutMode):
    """G sampled completions of each condition; a completion is its own context."""

    @cached_property
    def draw_codes(self) -> CodeSampler:
        config = self.config
        return CodeSampler(
            self.model, draw=self.draw, cfg_scale=config.cfg_scale, max_rows=config.max_rows,
            keep_memory=config.keep_memory,
        )  # fmt: skip

    def __call__(self, batch: ImageBatch) -> Trajectory:
        """[B] conditions -> Trajectory with R = B * G rows in groups of G, M = 1."""
        completion_ids = self.completion_ids(batch).flatten()  # [B*G]
        tokens, log_probs, kept_mass = self.draw_codes(batch.condition, row_ids=completion_ids)
        return Trajectory(
            condition=batch.condition.repeat_interleave(self.schedule.group_size),
            context=tokens[:, :-1],
            tokens=tokens[:, None],
            old_log_probs=log_probs[:, None],
            kept_mass=kept_mass[:, None] if self.draw.truncates else None,
            row_ids=completion_ids,
            completion_ids=completion_ids[:, None],
            real=self._real_rows(batch) if self.schedule.scores_targets else None,
        )

    def _real_rows(self, batch: ImageBatch) -> Trajectory:
        """The images for the cross-entropy, numbered downwards from -1, beside the completions."""
        return real_rows(batch.condition, self.encode(batch), row_ids=~batch.sample_ids)


def perturb(
    context: Tensor, sample_ids: Tensor, *, share: float, vocab_size: int, seed: int, impl: str = "auto"
) -> Tensor:
    """Replace a share of the context [B, T-1] by uniform random codes, a function of seed and sample ids only."""
    if share == 0.0:
        return context
    length, stream = context.shape[1], RandomStream.CONTEXT_NOISE
    uniform = philox_uniform(sample_ids, 2 * length, seed=seed, step=stream, impl=impl)  # [B, 2(T-1)]
    random_codes = (uniform[:, length:] * vocab_size).long().clamp_(max=vocab_size - 1)
    return torch.where(uniform[:, :length] < share, random_codes, context)


def build_draw(section: Rollout | Sampling, *, seed: int, impl: str) -> Draw:
    """How a section wants tokens to be drawn."""
    return Draw(temperature=section.temperature, top_k=section.top_k, top_p=section.top_p, seed=seed, impl=impl)


def build_rollout(
    model: Generator, encode: Callable[[ImageBatch], Tensor], config: Rollout, *, draw: Draw, schedule: Schedule
) -> RolloutMode:
    """The rollout of the section's mode, a function from B images to their trajectory."""
    mode = TeacherForcedRollout if config.mode == "teacher_forced" else AutoregressiveRollout
    return mode(model, encode, config, draw, schedule)
