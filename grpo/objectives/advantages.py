"""Advantages of completions: how much better each is than the others of its image.

The one definition, for K rewards r_k of B groups of G completions with weights w_k:

1. z_k is r_k, standardised first where its table says `normalise`: (r - mean) / (std + eps) over the completions of its
   group, or over all of all ranks.
2. S is the sum of w_k z_k over the rewards that are not `separate`, and A(S) its advantage by `objective.advantage`.
   `gdpo` is z_k by group, and A(S) = S (GDPO, arXiv 2601.05242).
3. Every separate reward adds w_k times an advantage of its own: A(r_k), or z_k where it is standardised (0 in a group
   without spread, wherever the group lies in the batch).

NaN says that a reward abstains. Mean and std are of those that have an opinion; who has none is moved by nothing, who
has none in all rewards of a sum has advantage 0, and so has a group with fewer than two opinions. Any other non-finite
reward is a fault and makes the advantages of its group non-finite. All of it is computed in fp64.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from grpo.config import Objective
from grpo.config.types import AdvantageKind, Normalise
from grpo.parallel import MetricSums, all_reduce_sums
from grpo.rewards import Rewarded

EPS = 1e-8  # added to standard deviations


class Combined(Protocol):
    """How a reward goes into the advantage."""

    @property
    def weight(self) -> float: ...

    @property
    def normalise(self) -> Normalise: ...

    @property
    def separate(self) -> bool: ...


class _Summand(NamedTuple):
    weight: float
    normalise: Normalise = "none"
    separate: bool = False


def credit(rewarded: Rewarded, *, group_size: int, objective: Objective) -> tuple[Tensor, MetricSums]:
    """Advantages [R, M] of completions in groups of G, one after the other, and how much the groups spread.

    Collective where statistics of all ranks are asked for.
    """
    groups = rewarded.total.view(-1, group_size)  # [B, G]
    components = rewarded.components.view(-1, *groups.shape)
    advantages = combined_advantages(
        components, list(rewarded.terms.values()), kind=objective.advantage, clip=objective.advantage_clip
    )
    metrics = MetricSums()
    metrics.add("zero_spread", (advantages == 0).all(dim=1).sum(), len(groups))
    if group_size > 1:
        metrics.add("group_std", groups.std(dim=1).sum(), len(groups))
    return advantages.view_as(rewarded.total), metrics


def combined_advantages(
    components: Tensor, how: Sequence[Combined], *, kind: AdvantageKind = "group_std", clip: float | None = None
) -> Tensor:
    """Advantages [B, G] fp32 of K rewards [K, B, G], NaN where one abstains; step 1 to 3 above.

    Args:
        how: weight, normalisation and place of each.
        clip: clamp to plus and minus this, at the very end.
    """
    by_group = kind == "gdpo"
    summands, advantages = [], components.new_zeros(components.shape[1:], dtype=torch.float64)
    for rewards, way in zip(components.double(), how, strict=True):
        normalise = "group" if by_group and way.normalise == "none" else way.normalise
        normalised = _standardise(rewards, normalise)
        if not way.separate:
            summands.append((normalised, way.weight))
        elif normalise == "none":
            advantages += way.weight * group_advantages(rewards, kind=kind)
        else:
            advantages += way.weight * torch.where(_teaches(rewards), normalised, 0.0)
    if summands:
        advantages += group_advantages(_weighted_sum(summands), kind="group_mean" if by_group else kind)
    advantages = advantages.float()
    return advantages if clip is None else advantages.clamp(-clip, clip)


def group_advantages(
    rewards: Tensor,
    *,
    kind: AdvantageKind = "group_std",
    clip: float | None = None,
    components: Tensor | None = None,
    component_weights: Sequence[float] | None = None,
    eps: float = EPS,
) -> Tensor:
    """Advantages of B groups of G completions by one reward.

    `group_std` (r - mean) / (std + eps) within the group, std unbiased (GRPO, arXiv 2402.03300); `group_mean` without
    the division (Dr. GRPO, arXiv 2503.20783); `leave_one_out` r minus the mean of the others (RLOO, arXiv 2402.14740);
    `batch_std` r - group mean over the std of all rewards of all ranks (REINFORCE++, arXiv 2501.03262); `gdpo` the
    weighted sum of each component's own `group_std` advantage.

    Args:
        rewards: [B, G]; NaN abstains.
        clip: clamp to plus and minus this.
        components, component_weights: [K, B, G] the rewards before weighting, and their K weights (gdpo only).
        eps: added to standard deviations.

    Returns:
        [B, G], at least fp32; exactly 0 in a group without spread and where the reward abstains.

    Raises:
        ValueError: unknown kind, G < 2, or gdpo without components. `batch_std` is collective over ranks.
    """
    if kind not in (known := get_args(AdvantageKind)):
        raise ValueError(f"unknown advantage kind {kind!r}; one of {', '.join(known)}")
    size = rewards.shape[-1]
    if size < 2 and kind != "batch_std":
        raise ValueError(f"{kind} compares completions of one image and needs at least 2 of them")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if kind == "gdpo":
        if components is None or component_weights is None:
            raise ValueError("gdpo needs the rewards before weighting and their weights")
        return combined_advantages(components, list(map(_Summand, component_weights)), kind=kind, clip=clip).to(dtype)
    rewards = rewards.double()
    filled, opinions = _filled(rewards), (~rewards.isnan()).sum(dim=1, keepdim=True)
    advantages = filled - filled.mean(dim=1, keepdim=True) if size > 1 else filled
    if kind == "group_std":
        variance = advantages.square().sum(dim=1, keepdim=True) / (opinions - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps)
    elif kind == "leave_one_out":
        advantages = advantages * (opinions / (opinions - 1).clamp(min=1))
    elif kind == "batch_std":
        advantages = advantages / (_global_moments(rewards)[1] + eps)
    advantages = torch.where(_teaches(rewards), advantages, 0.0).to(dtype)
    return advantages if clip is None else advantages.clamp(-clip, clip)


def spreadless_groups(rewards: Tensor) -> Tensor:
    """Which groups [B, G] have no spread beyond fp32 rounding of their values, [B] bool; NaN abstains.

    Equal images decoded in different batches differ by a few units in the last place, which says nothing about them.
    """
    filled = _filled(rewards)
    spread = filled.amax(dim=1) - filled.amin(dim=1)
    largest = filled.abs().amax(dim=1)
    return largest.isfinite() & (spread <= 8 * torch.finfo(torch.float32).eps * largest)


def _teaches(rewards: Tensor) -> Tensor:
    """Which completions [B, G] have a reward, in a group whose rewards differ or that has only this one."""
    present = ~rewards.isnan()
    return present & ~spreadless_groups(rewards)[:, None] if rewards.shape[1] > 1 else present


def _filled(rewards: Tensor) -> Tensor:
    """Where a reward abstains, its mean over the rest of the group, so that it moves nothing; 0 in a group of none."""
    absent = rewards.isnan()
    others = rewards.nanmean(dim=1, keepdim=True).masked_fill(absent.all(dim=1, keepdim=True), 0.0)
    return torch.where(absent, others, rewards)


def _standardise(rewards: Tensor, normalise: Normalise) -> Tensor:
    """Rewards [B, G] with mean 0 and std 1 over their group or over all of all ranks; NaN stays, and new is none."""
    if normalise == "none":
        return rewards
    if normalise == "group":
        normalised = group_advantages(rewards, kind="group_std")
    else:
        mean, std = _global_moments(rewards)
        normalised = (rewards - mean) / (std + EPS)
    faults = normalised.isnan() & ~rewards.isnan()  # inf - inf is no opinion that is missing
    return torch.where(rewards.isnan(), rewards, normalised.masked_fill(faults, float("inf")))


def _weighted_sum(summands: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The sum of rewards by their weights, NaN where all of them abstain."""
    first, *others = (weight * _filled(rewards) for rewards, weight in summands)
    total = sum(others, start=first)
    absent = torch.stack([rewards.isnan() for rewards, _ in summands]).all(dim=0)
    return total.masked_fill(absent, float("nan"))


def _global_moments(rewards: Tensor) -> tuple[float, float]:
    """Mean and unbiased std of the rewards of all ranks that have an opinion; two passes, for large offsets."""
    present = ~rewards.isnan()
    total = all_reduce_sums({"sum": rewards.double().where(present, 0.0).sum(), "count": present.sum()})
    mean = total["sum"] / max(total["count"], 1)
    deviations = (rewards.double() - mean).where(present, 0.0)
    squares = all_reduce_sums({"squares": deviations.square().sum()})["squares"]
    return mean, (squares / max(total["count"] - 1, 1)) ** 0.5
