"""Distances between sets of images, from their features. All arithmetic is in fp64, on the device of the inputs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS_AT_ONCE = 4096


class FeatureStatistics(NamedTuple):
    """Mean [D] and unbiased covariance [D, D] of a set of feature vectors, both fp64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Of features [N, D], N >= 2."""
        assert len(features) >= 2, "a covariance takes two vectors"
        features = features.double()
        mean = features.mean(dim=0)
        centered = features - mean
        return cls(mean, centered.T @ centered / (len(features) - 1))


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians, the FID where the features are Inception's.

    |m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1 C2)^½), Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500.

    The last trace is the sum of the singular values of F1ᵀ F2 with C = F Fᵀ, since F1ᵀ C2 F1 has the eigenvalues of
    C1 C2. Taking no root of rounding errors, this stays exact where there are fewer images than dimensions and C1 C2
    is singular. NaN where a moment is not finite.
    """
    if not all(bool(moment.isfinite().all()) for moment in (*first, *second)):
        return math.nan
    product = _factor(first.covariance).T @ _factor(second.covariance)
    spread = first.covariance.trace() + second.covariance.trace() - 2 * torch.linalg.svdvals(product).sum()
    return ((first.mean - second.mean).square().sum() + spread).item()


def _factor(covariance: Tensor) -> Tensor:
    """F [D, rank] with F Fᵀ = covariance; directions whose variance is rounding error are left out."""
    variances, directions = torch.linalg.eigh(covariance)
    threshold = variances.max().clamp(min=0) * len(variances) * torch.finfo(torch.float64).eps
    kept = variances > threshold
    return directions[:, kept] * variances[kept].sqrt()


def kernel_distance(
    first: Tensor, second: Tensor, *, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """KID: unbiased squared maximum mean discrepancy under the kernel (x·y / D + 1)³.

    Bińkowski et al. 2018, arXiv 1801.01401. The mean over `subsets` random subsets drawn without replacement, as is
    usual; where the smaller set has at most `subset_size` vectors there is one subset of that many.

    Args:
        first, second: features [N, D] and [M, D], at least two of each.

    Returns:
        (mean, standard deviation over the subsets).
    """
    smaller = min(len(first), len(second))
    if smaller <= subset_size:
        subset_size, subsets = smaller, 1
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size]].double()

    values = torch.stack([_mean_discrepancy(subset(first), subset(second)) for _ in range(subsets)])
    return values.mean().item(), values.std(correction=0).item()


def _mean_discrepancy(first: Tensor, second: Tensor) -> Tensor:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_between_different(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return mean_between_different(first) + mean_between_different(second) - 2 * kernel(first, second).mean()


def precision_recall(images: Tensor, reference: Tensor, *, nearest_k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, each in 0..1: Kynkäänniemi et al. 2019, arXiv 1904.06991.

    A set's manifold is the union of balls around its vectors, each reaching to its `nearest_k`-th nearest neighbour in
    the set. Precision is the share of `images` on the manifold of `reference` (fidelity), recall the share of
    `reference` on the manifold of `images` (coverage).

    Args:
        images, reference: features [N, D] and [M, D], each with more than `nearest_k` vectors.
    """
    images, reference = images.double(), reference.double()
    return _share_on_manifold(images, reference, nearest_k), _share_on_manifold(reference, images, nearest_k)


def _share_on_manifold(features: Tensor, vectors: Tensor, nearest_k: int) -> float:
    """Share of features on the manifold of the vectors."""
    assert len(vectors) > nearest_k, f"{len(vectors)} vectors have no {nearest_k} neighbours each"
    # Each vector is its own nearest, at distance 0: hence k + 1.
    parts = [torch.cdist(rows, vectors).kthvalue(nearest_k + 1).values for rows in vectors.split(_ROWS_AT_ONCE)]
    radii = torch.cat(parts)
    inside = [(torch.cdist(rows, vectors) <= radii).any(dim=1) for rows in features.split(_ROWS_AT_ONCE)]
    return torch.cat(inside).double().mean().item()


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp of the mean KL between p(class | image) and its mean over the images, Salimans et al. 2016, arXiv 1606.03498.

    Args:
        probabilities: [N, K], rows sum to 1; split in random order into `splits` parts.

    Returns:
        (mean, standard deviation over the parts).
    """
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
    return score_of_parts(probabilities[order].double().tensor_split(min(splits, len(probabilities))))


def score_of_parts(parts: Sequence[Tensor]) -> tuple[float, float]:
    """The mean and the standard deviation of the inception scores of parts [n, K] fp64."""
    divergences = [torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0, keepdim=True)) for part in parts]
    scores = torch.stack([divergence.sum(dim=1).mean().exp() for divergence in divergences])
    return scores.mean().item(), scores.std(correction=0).item()
