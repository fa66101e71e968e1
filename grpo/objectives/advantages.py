"""Advantages of completions: how much better each is than the others of its image."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from grpo.config import Objective
from grpo.config.types import AdvantageKind
from grpo.parallel import MetricSums, all_reduce_sums
from grpo.rewards import Rewarded


def credit(rewarded: Rewarded, *, group_size: int, objective: Objective) -> tuple[Tensor, MetricSums]:
    """Advantages [R, M] of completions in groups of G, one after the other, and how much the groups spread."""
    groups = rewarded.total.view(-1, group_size)  # [B, G]
    parts = {"components": rewarded.components.view(-1, *groups.shape), "component_weights": rewarded.weights}
    advantages = group_advantages(groups, kind=objective.advantage, clip=objective.advantage_clip, **parts)
    metrics = MetricSums()
    metrics.add("zero_spread", spreadless_groups(groups).sum(), len(groups))
    if group_size > 1:
        metrics.add("group_std", groups.std(dim=1).sum(), len(groups))
    return advantages.view_as(rewarded.total), metrics


def spreadless_groups(rewards: Tensor) -> Tensor:
    """Which groups [B, G] have no spread beyond fp32 rounding of their values, [B] bool.

    Equal images decoded in different batches differ by a few units in the last place, which says nothing about them.
    """
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)
    return spread <= 8 * torch.finfo(torch.float32).eps * rewards.abs().amax(dim=1)


def group_advantages(
    rewards: Tensor,
    *,
    kind: AdvantageKind = "group_std",
    clip: float | None = None,
    components: Tensor | None = None,
    component_weights: Sequence[float] | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Advantages of B groups of G completions.

    `group_std` (r - mean) / (std + eps) within the group, std unbiased (GRPO, arXiv 2402.03300); `group_mean` without
    the division (Dr. GRPO, arXiv 2503.20783); `leave_one_out` r minus the mean of the others (RLOO, arXiv 2402.14740);
    `batch_std` r - group mean over the std of all rewards of all ranks (REINFORCE++, arXiv 2501.03262); `gdpo` the
    weighted sum of each component's own `group_std` advantage (GDPO).

    Args:
        rewards: [B, G] fp32, the weighted sums.
        clip: clamp to plus and minus this.
        components, component_weights: [K, B, G] the rewards before weighting, and their K weights (gdpo only).
        eps: added to standard deviations.

    Returns:
        [B, G] fp32; exactly 0 in a group without spread. Non-finite rewards give non-finite advantages.

    Raises:
        ValueError: unknown kind, G < 2, or gdpo without components. `batch_std` is collective over ranks.
    """
    if kind not in (known := get_args(AdvantageKind)):
        raise ValueError(f"unknown advantage kind {kind!r}; one of {', '.join(known)}")
    size = rewards.shape[-1]
    if size < 2 and kind != "batch_std":
        raise ValueError(f"{kind} compares completions of one image and needs at least 2 of them")
    rewards = rewards.float()
    if kind == "gdpo":
        if components is None or component_weights is None:
            raise ValueError("gdpo needs the rewards before weighting and their weights")
        parts = zip(components, component_weights, strict=True)
        advantages = sum(weight * group_advantages(part, eps=eps) for part, weight in parts)
    else:
        advantages = rewards - rewards.mean(dim=1, keepdim=True) if size > 1 else rewards
        if kind == "group_std":
            advantages = advantages / (rewards.std(dim=1, keepdim=True) + eps)
        elif kind == "leave_one_out":
            advantages = advantages * (size / (size - 1))
        elif kind == "batch_std":
            advantages = advantages / (_global_std(rewards) + eps)
        if size > 1:
            advantages = advantages.masked_fill(spreadless_groups(rewards)[:, None], 0.0)
    return advantages if clip is None else advantages.clamp(-clip, clip)


def _global_std(rewards: Tensor) -> Tensor:
    """Unbiased standard deviation of the rewards of all ranks; two passes, since rewards may share a large offset."""
    total = all_reduce_sums({"sum": rewards.double().sum(), "count": rewards.numel()})
    deviations = rewards.double() - total["sum"] / total["count"]
    squares = all_reduce_sums({"squares": deviations.square().sum()})["squares"]
    return rewards.new_tensor((squares / max(total["count"] - 1, 1)) ** 0.5)
