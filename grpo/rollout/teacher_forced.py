"""Sampling every position of an image at once, under the codes of a real one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grpo.config import Rollout
from grpo.data import ImageBatch
from grpo.kernels import linear_token_log_probs, philox_uniform, sample_and_score, sample_projection
from grpo.rollout.trajectory import Scores, Trajectory

NOISE_STREAM = 1  # `step` of the generator for context noise; sampling uses 0


class TeacherForcedRollout:
    """G completions of each image, drawn from one row of logits per position in one pass.

    Args:
        model: a GPT.
        encode: images -> codes [B, T], by the frozen tokenizer.
        config: the rollout section.
        seed: of the run.
        keep_graph: score what is drawn from the same logits, with gradient (`Trajectory.scores`), so that the update
            needs no forward of its own.
        with_targets: these scores hold the real codes' too. At temperature 1 they always do; elsewhere it is a pass.
        impl: backend of sampling.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: Callable[[ImageBatch], Tensor],
        config: Rollout,
        *,
        seed: int,
        keep_graph: bool,
        with_targets: bool = True,
        impl: str,
    ) -> None:
        self.model, self.encode, self.config = model, encode, config
        self.seed, self.keep_graph, self.with_targets, self.impl = seed, keep_graph, with_targets, impl

    def __call__(self, batch: ImageBatch) -> Trajectory:
        """[B] images -> Trajectory with R = B rows, M = G."""
        codes = self.encode(batch)  # [B, T]
        context = perturb(
            codes[:, :-1],
            batch.sample_ids,
            share=self.config.context_noise_share,
            vocab_size=self.model.config.vocab_size,
            seed=self.seed,
        )
        with torch.set_grad_enabled(self.keep_graph):
            hidden = self.model.hidden(context, batch.class_ids).flatten(0, 1)  # [B*T, D]
            tokens, log_probs, kept_mass, scores = self._sample(hidden, batch.sample_ids, codes)
        truncated = self.config.top_k > 0 or self.config.top_p < 1.0
        group = torch.arange(self.config.num_generations, device=codes.device)
        return Trajectory(
            class_ids=batch.class_ids,
            context=context,
            tokens=tokens,
            old_log_probs=log_probs.detach(),
            target_tokens=codes,
            kept_mass=kept_mass[:, None].expand_as(log_probs) if truncated else None,
            completion_ids=batch.sample_ids[:, None] * self.config.num_generations + group,
            scores=scores,
        )

    def _sample(
        self, hidden: Tensor, sample_ids: Tensor, codes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Scores | None]:
        """hidden [B*T, D] -> tokens and log-probs [B, G, T], kept mass [B, T], scores with the graph of `hidden`."""
        config, weight, (rows, length) = self.config, self.model.output.weight, codes.shape
        settings = {
            "num_samples": config.num_generations,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "seed": self.seed,
            "row_ids": (sample_ids[:, None] * length + torch.arange(length, device=codes.device)).flatten(),
            "impl": self.impl,
        }

        def by_image(values: Tensor) -> Tensor:
            return values.view(rows, length, -1).transpose(1, 2)

        if not self.keep_graph:
            tokens, log_probs, kept_mass = sample_projection(hidden, weight, **settings)
            return by_image(tokens).contiguous(), by_image(log_probs).contiguous(), kept_mass.view(rows, length), None
        targets = codes.flatten()
        sample = sample_and_score(hidden, weight, targets=targets if config.temperature == 1.0 else None, **settings)
        target_log_probs = sample.target_log_probs
        if target_log_probs is None and self.with_targets:
            target_log_probs = linear_token_log_probs(hidden, weight, targets[:, None], impl=self.impl)
        scores = Scores(
            by_image(sample.log_probs).contiguous(),
            sample.entropy.view(rows, length),
            None if target_log_probs is None else target_log_probs.reshape(rows, length),
        )
        return by_image(sample.tokens).contiguous(), scores.log_probs, sample.kept_mass.view(rows, length), scores


def perturb(context: Tensor, sample_ids: Tensor, *, share: float, vocab_size: int, seed: int) -> Tensor:
    """Replace a share of the context [B, T-1] by uniform random codes, a function of seed and sample ids only."""
    if share == 0.0:
        return context
    length = context.shape[1]
    uniform = philox_uniform(sample_ids, 2 * length, seed=seed, step=NOISE_STREAM)  # [B, 2(T-1)]
    random_codes = (uniform[:, length:] * vocab_size).long().clamp_(max=vocab_size - 1)
    return torch.where(uniform[:, :length] < share, random_codes, context)
