"""Sampling every position of an image at once, under the codes of a real one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grpo.config import Rollout
from grpo.data import ImageBatch
from grpo.kernels import philox_uniform, project_logits, sample_tokens
from grpo.rollout.trajectory import Trajectory

NOISE_STREAM = 1  # `step` of the generator for context noise; sampling uses 0
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}  # logits in memory at once, by device type


class TeacherForcedRollout:
    """G completions of each image, drawn from one row of logits per position in one pass.

    Args:
        model: a GPT.
        encode: images -> codes [B, T], by the frozen tokenizer.
        config: the rollout section.
        seed: of the run.
        keep_graph: keep the forward's graph in `Trajectory.hidden`, so that the update needs no forward of its own.
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
        impl: str,
    ) -> None:
        self.model, self.encode, self.config = model, encode, config
        self.seed, self.keep_graph, self.impl = seed, keep_graph, impl

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
            hidden = self.model.hidden(context, batch.class_ids)  # [B, T, D]
        tokens, log_probs, kept_mass = self._sample(hidden.detach(), batch.sample_ids)
        truncated = self.config.top_k > 0 or self.config.top_p < 1.0
        group = torch.arange(self.config.num_generations, device=codes.device)
        return Trajectory(
            class_ids=batch.class_ids,
            context=context,
            tokens=tokens,
            old_log_probs=log_probs,
            target_tokens=codes,
            kept_mass=kept_mass if truncated else None,
            completion_ids=batch.sample_ids[:, None] * self.config.num_generations + group,
            hidden=hidden if self.keep_graph else None,
        )

    @torch.no_grad()
    def _sample(self, hidden: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, D] -> tokens, log_probs, kept_mass, each [B, G, T]; logits exist in chunks only."""
        config, (rows, length, _) = self.config, hidden.shape
        flat = hidden.flatten(0, 1)
        row_ids = (sample_ids[:, None] * length + torch.arange(length, device=hidden.device)).flatten()  # [B*T]
        chunk = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 22) // self.model.config.vocab_size)
        samples = [
            sample_tokens(
                project_logits(flat[start : start + chunk], self.model.output.weight),
                num_samples=config.num_generations,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=self.seed,
                row_ids=row_ids[start : start + chunk],
                impl=self.impl,
            )
            for start in range(0, rows * length, chunk)
        ]

        def stack(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).view(rows, length, -1).transpose(1, 2).contiguous()

        tokens, log_probs = stack([s.tokens for s in samples]), stack([s.log_probs for s in samples])
        kept_mass = stack([s.kept_mass[:, None] for s in samples]).expand_as(log_probs)
        return tokens, log_probs, kept_mass


def perturb(context: Tensor, sample_ids: Tensor, *, share: float, vocab_size: int, seed: int) -> Tensor:
    """Replace a share of the context [B, T-1] by uniform random codes, a function of seed and sample ids only."""
    if share == 0.0:
        return context
    length = context.shape[1]
    uniform = philox_uniform(sample_ids, 2 * length, seed=seed, step=NOISE_STREAM)  # [B, 2(T-1)]
    random_codes = (uniform[:, length:] * vocab_size).long().clamp_(max=vocab_size - 1)
    return torch.where(uniform[:, :length] < share, random_codes, context)
