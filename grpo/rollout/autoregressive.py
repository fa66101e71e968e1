"""True sampling: one token after the other with a static KV cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo.config import Rollout
from grpo.data import ImageBatch
from grpo.kernels import project_logits, sample_tokens
from grpo.parallel import gathered
from grpo.rollout.scoring import guide
from grpo.rollout.trajectory import Trajectory, real_rows


class Decoded(NamedTuple):
    """Sampled images as codes."""

    tokens: Tensor
    """[N, T] int64."""
    log_probs: Tensor
    """[N, T] fp32, of the full tempered (and guided) distribution."""
    kept_mass: Tensor
    """[N, T] fp32, probability of the set that top-k and top-p left to draw from."""


@torch.no_grad()
def decode(
    model: nn.Module,
    class_ids: Tensor,
    *,
    row_ids: Tensor,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    impl: str = "auto",
) -> Decoded:
    """Draw one completion of each condition.

    Args:
        model: a GPT; under FSDP2 its parameters are gathered once for the whole call.
        class_ids: [N] int64.
        row_ids: [N] int64, global numbers of the completions; their random numbers depend on nothing else.
        cfg_scale: classifier-free guidance, 1 is off.
        cfg_interval: guidance is switched off after this decode step (LlamaGen's `cfg_interval`); -1 keeps it on.
        temperature, top_k, top_p, seed: see `sample_tokens`.
    """
    length = model.config.block_size
    guided = cfg_scale != 1.0
    conditions = torch.cat([class_ids, torch.full_like(class_ids, model.config.num_classes)]) if guided else class_ids
    steps = []
    with gathered(model):
        weight = model.output.weight
        cache = model.init_cache(conditions.shape[0], dtype=weight.dtype, device=class_ids.device)
        positions = torch.arange(length, device=class_ids.device)
        for position in range(length):
            if position == 0:
                hidden = model.prefill(conditions, cache)
            else:
                previous = steps[-1].tokens[:, 0]
                hidden = model.decode(previous.repeat(2) if guided else previous, positions[position], cache)
            if guided:
                active = cfg_interval < 0 or position - 1 <= cfg_interval
                hidden = guide(hidden, cfg_scale if active else 1.0)
            steps.append(
                sample_tokens(
                    project_logits(hidden, weight),
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    seed=seed,
                    row_ids=row_ids * length + position,
                    impl=impl,
                )
            )
    return Decoded(
        torch.stack([step.tokens[:, 0] for step in steps], dim=1),
        torch.stack([step.log_probs[:, 0] for step in steps], dim=1),
        torch.stack([step.kept_mass for step in steps], dim=1),
    )


def generate(
    model: nn.Module,
    class_ids: Tensor,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    row_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Codes [B, T] of one image for each of `class_ids` [B]; see `decode` for the arguments.

    An image depends on its class, the seed and its row id only (by default its place in `class_ids`), not on what is
    generated with it.
    """
    if row_ids is None:
        row_ids = torch.arange(class_ids.shape[0], device=class_ids.device)
    return decode(
        model,
        class_ids,
        row_ids=row_ids,
        cfg_scale=cfg_scale,
        cfg_interval=cfg_interval,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        impl=impl,
    ).tokens


class AutoregressiveRollout:
    """G sampled completions of each image's class; a completion is its own context.

    Args:
        model: a GPT.
        encode: images -> codes [B, T], when real images are wanted too, for the auxiliary cross-entropy.
        config: the rollout section.
        seed: of the run.
        impl: backend of sampling.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: Callable[[ImageBatch], Tensor] | None,
        config: Rollout,
        *,
        seed: int,
        impl: str,
    ) -> None:
        self.model, self.encode, self.config, self.seed, self.impl = model, encode, config, seed, impl

    def __call__(self, batch: ImageBatch) -> Trajectory:
        """[B] conditions -> Trajectory with R = B * G rows in groups of G, M = 1."""
        config = self.config
        group = torch.arange(config.num_generations, device=batch.class_ids.device)
        completion_ids = (batch.sample_ids[:, None] * config.num_generations + group).flatten()  # [B*G]
        class_ids = batch.class_ids.repeat_interleave(config.num_generations)
        chunk = config.max_rows or len(class_ids)
        parts = [
            decode(
                self.model,
                class_ids[start : start + chunk],
                row_ids=completion_ids[start : start + chunk],
                cfg_scale=config.cfg_scale,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=self.seed,
                impl=self.impl,
            )
            for start in range(0, len(class_ids), chunk)
        ]
        tokens, log_probs, kept_mass = (torch.cat(part) for part in zip(*parts, strict=True))
        truncated = config.top_k > 0 or config.top_p < 1.0
        return Trajectory(
            class_ids=class_ids,
            context=tokens[:, :-1],
            tokens=tokens[:, None],
            old_log_probs=log_probs[:, None],
            kept_mass=kept_mass[:, None] if truncated else None,
            completion_ids=completion_ids[:, None],
            real=None if self.encode is None else real_rows(batch.class_ids, self.encode(batch)),
        )
