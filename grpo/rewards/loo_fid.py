"""What each completion does to the Fréchet distance between the policy's images and real ones.

The reward of completion i is n (FD without i - FD with all), in a network's features. FD is between two Gaussians,
|m - m'|² + tr(C) + tr(C') - 2 tr((C C')^½); that of the policy is over all completions of the step, on all ranks, and a
moving average over those of former steps. n is the number of samples that these statistics stand for, so the scale of
the reward depends neither on the batch nor on the memory.

diagonal: C and C' are diagonal, and the difference is exact (LOO-FID's form). full: whole covariances, to first order
in 1/n, with T = C^-½ (C^½ C' C^½)^½ C^-½ the optimal-transport map from our Gaussian to the real one. All is fp64.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from grpo.config import UserError, reading, require_regular
from grpo.config.types import LARGEST_INT, ProperFraction, Wanted
from grpo.parallel import sum_over_ranks
from grpo.rewards.base import DecodedBatch, PopulationReward, RewardContext
from grpo.rewards.image_network import ImageNetwork, NetworkTable

INCEPTION = "torchvision:inception_v3"
Count = Annotated[int, Ge(2), Le(LARGEST_INT)]


class Gaussian(NamedTuple):
    """Mean [D] and covariance [D, D], or its diagonal [D], of the population itself (divided by N), fp64."""

    mean: Tensor
    spread: Tensor

    def mixed_with(self, other: "Gaussian", share: Tensor | float) -> "Gaussian":
        """The moments of a mixture of which the other has this share."""
        apart = self.mean - other.mean
        diagonal = other.spread.dim() == other.mean.dim()
        between = apart.square() if diagonal else torch.outer(apart, apart)
        spread = torch.lerp(self.spread, other.spread, share) + share * (1 - share) * between
        return Gaussian(torch.lerp(self.mean, other.mean, share), spread)


class LeaveOneOutFID(PopulationReward):
    """How much farther the policy's images would be from the real ones without this completion, by a network.

    The formulas are at the head of this file. The memory is part of the checkpoints.
    """

    class Settings(NetworkTable):
        """What each completion does to the FID in the features of a network; several tables take several networks."""

        net: str = INCEPTION
        """classifier: what `grpo classifier` writes; torchvision:NAME or timm:NAME: a network of that library.
        Inception gets images of 299 pixels, none of which is cut off."""
        covariance: Literal["diagonal", "full"] = "diagonal"
        """diagonal: exact, of the features' variances; full: to first order, of the whole covariance."""
        memory: ProperFraction = 0.99
        """Share of the statistics that is kept from step to step: N completions a step make them stand for
        N / (1 - memory) samples, which should be thousands. 0 takes those of the step alone."""
        reference: Annotated[str | None, Wanted("an .npz with mu and sigma of the same features")] = None
        """Statistics of the real images; none computes them at the start, from the data set."""
        reference_images: Count = 10_000
        """Images of the data set to take for that, at most."""

        def resolved(self) -> Self:
            whole = {"resize": 299} if self.net == INCEPTION and self.resize is None else {}
            return NetworkTable.resolved(self.model_copy(update=whole))

        def image_uses(self) -> Iterator[str]:
            if self.reference is None:
                yield "reference is required: there are no real images to measure"

        def size_problems(self, *, image_size: int, completions: int) -> Iterator[str]:
            if completions < 2:
                keys = "rollout.batch_size or rollout.num_generations"
                yield f"a distance without one completion needs at least 2 of them in a step: raise {keys}"

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.network = ImageNetwork(settings.resolved(), context, output="features")
        self.networks = [self.network.network]
        self.full, self.keep, device = settings.covariance == "full", settings.memory, context.device
        size = self.network(torch.zeros(1, 3, 64, 64, device=device)).shape[1]
        if settings.reference is not None:
            self.reference = read_statistics(settings.reference, size, full=self.full, device=device)
        else:
            assert context.real_images is not None, "the job gives a way to the data set's images"
            self.reference = self._measure(context.real_images(settings.reference_images), size, device)
        self._memory = Gaussian(*(torch.zeros_like(moment) for moment in self.reference))
        self._weight = torch.zeros((), dtype=torch.float64, device=device)  # of the memory; 1 in the long run

    def features(self, batch: DecodedBatch) -> Tensor:
        """-> [n, D] fp32."""
        return self.network(batch.images)

    def score(self, features: Tensor) -> Tensor:
        """Take the step into the memory, then say what each completion has done to the distance: -> [N] fp32.

        NaN, which is a fault, where a feature is not finite; the memory then stays as it was.
        """
        features = features.double()
        batch, count = moments(features, full=self.full)
        if count < 2:
            raise UserError("covariance: a distance without one completion needs at least 2 of them in a step")
        memory, weight = self._memory, self.keep * self._weight + (1 - self.keep)
        share = (1 - self.keep) / weight  # of this batch: 1 in the first step, so that nothing is biased
        now = memory.mixed_with(batch, share)
        if not all(moment.isfinite().all() for moment in now):
            return torch.full_like(features[:, 0], float("nan"))
        if self.full:
            influence = first_order(features, now, self.reference)
            rewards = sum_over_ranks(influence.sum()) / count - influence
        else:
            rewards = leave_one_out(features, batch, memory, now, self.reference, share=share, count=count)
        for kept, new in zip((*memory, self._weight), (*now, weight), strict=True):
            kept.copy_(new)
        return rewards.float()

    def state_tensors(self) -> dict[str, Tensor]:
        return {"mean": self._memory.mean, "spread": self._memory.spread, "weight": self._weight}

    def _measure(self, images: Iterable[Tensor], size: int, device: torch.device) -> Gaussian:
        """Of real images, of which each rank has its share."""
        seen = [self.network(batch) for batch in images]
        features = torch.cat(seen) if seen else torch.zeros(0, size, device=device)
        reference, count = moments(features.double(), full=self.full)
        if count < 2:
            raise UserError(
                "reference: the data set has no two images that can be read; give an .npz with mu and sigma"
            )
        return reference


def moments(features: Tensor, *, full: bool) -> tuple[Gaussian, int]:
    """Of the features [N, D] fp64 of all ranks, and how many there are. Collective."""
    total = sum_over_ranks(torch.cat([features.sum(dim=0), features.new_tensor([len(features)])]))
    count = total[-1].item()
    mean = total[:-1] / max(count, 1)
    centred = features - mean
    spread = sum_over_ranks(centred.T @ centred if full else centred.square().sum(dim=0)) / max(count, 1)
    return Gaussian(mean, spread), int(count)


def leave_one_out(
    features: Tensor,
    batch: Gaussian,
    memory: Gaussian,
    now: Gaussian,
    reference: Gaussian,
    *,
    share: Tensor | float,
    count: int,
) -> Tensor:
    """n (FD without i - FD) of features [N, D], all Gaussians diagonal; exact, O(N D).

    Args:
        batch: of the step's `count` completions on all ranks; it has `share` in `now`, the memory before it the rest.
    """
    offset = features - batch.mean  # [N, D]
    mean = batch.mean - offset / (count - 1)
    variance = (batch.spread - offset.square() / (count - 1)) * (count / (count - 1))
    without = memory.mixed_with(Gaussian(mean, variance.clamp(min=0)), share)
    return (diagonal_distance(without, reference) - diagonal_distance(now, reference)) * count / share


def diagonal_distance(first: Gaussian, second: Gaussian) -> Tensor:
    """Squared Fréchet distance of Gaussians with diagonal covariances, over the last dimension."""
    deviations = first.spread.sqrt() - second.spread.sqrt()
    return ((first.mean - second.mean).square() + deviations.square()).sum(dim=-1)


def first_order(features: Tensor, now: Gaussian, reference: Gaussian) -> Tensor:
    """φ(f) = 2 (m - m')·(f - m) + (f - m)ᵀ (I - T) (f - m) of features [N, D]: FD's derivative by the weight of each.

    n (FD without i - FD) is the mean of φ over the step's completions minus φ(f_i), to first order in 1/n. The features
    lie in the span of the covariance, where T is defined; directions without variance are left out.
    """
    variances, directions = torch.linalg.eigh(now.spread)
    kept = variances > variances.max().clamp(min=0) * len(variances) * torch.finfo(torch.float64).eps
    directions, deviations = directions[:, kept], variances[kept].sqrt()  # [D, r], [r]
    between = deviations[:, None] * (directions.T @ reference.spread @ directions) * deviations
    values, axes = torch.linalg.eigh(between)  # (C^½ C' C^½)^½ = axes values^½ axesᵀ
    roots = values.clamp(min=0).sqrt()
    offset = features - now.mean  # [N, D]
    seen = (offset @ directions / deviations) @ axes  # [N, r]
    return 2 * offset @ (now.mean - reference.mean) + offset.square().sum(dim=1) - seen.square() @ roots


def read_statistics(path: str, size: int, *, full: bool, device: torch.device) -> Gaussian:
    """mu [D] and sigma [D, D] of an .npz.

    Raises:
        UserError: it cannot be read, or the features are others.
    """
    with reading(f"reference: {path} is no .npz with arrays mu and sigma"):
        require_regular(path)
        with np.load(Path(path), allow_pickle=False) as arrays:
            if missing := {"mu", "sigma"} - set(arrays):
                raise ValueError(f"it has no {min(missing)}")
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    if mean.shape != (size,) or covariance.shape != (size, size):
        found = f"mu {list(mean.shape)} and sigma {list(covariance.shape)}"
        raise UserError(f"reference: {path} has {found}, the network {size} features: take statistics of its own")
    if not (mean.isfinite().all() and covariance.isfinite().all() and (covariance.diagonal() >= 0).all()):
        raise UserError(f"reference: {path} holds no covariance: a value is not finite, or a variance below 0")
    return Gaussian(mean.to(device), (covariance if full else covariance.diagonal()).to(device, copy=True))
