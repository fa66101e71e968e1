"""Metrics against closed forms, hand-computed cases and a second formula."""

import math

import pytest
import torch
from torch.testing import assert_close

from grpo.evaluation.distances import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_statistics_are_the_unbiased_ones():
    features = normal(30, 4, seed=0).float()
    statistics = FeatureStatistics.of(features)
    assert_close(statistics.mean, features.double().mean(0))
    assert_close(statistics.covariance, torch.cov(features.double().T))


def test_frechet_distance_of_independent_dimensions():
    """With diagonal covariances it is |m1 - m2|² + the sum of (s1 - s2)²."""
    first = FeatureStatistics(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()))
    second = FeatureStatistics(torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 25.0]).double()))
    assert frechet_distance(first, second) == pytest.approx(9 + 1 + 4, abs=1e-12)


@pytest.mark.parametrize(("images", "dimensions"), [(200, 12), (20, 64)])
def test_frechet_distance_equals_the_nuclear_norm_form(images, dimensions):
    """tr (C1 C2)^½ is also the sum of the singular values of X1 X2ᵀ, X the centred features over √(N - 1)."""
    mixing = normal(dimensions, dimensions, seed=1)
    first, second = normal(images, dimensions, seed=2) @ mixing, normal(images + 7, dimensions, seed=3) + 0.3
    roots = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (first, second)]
    expected = (first.mean(0) - second.mean(0)).square().sum() + sum(root.square().sum() for root in roots)
    expected = expected - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    actual = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert actual == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_a_shift_is_exact_with_fewer_images_than_dimensions():
    features = normal(10, 100, seed=4) * 30
    same, shifted = FeatureStatistics.of(features), FeatureStatistics.of(features + 0.5)
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(same, shifted) == pytest.approx(100 * 0.25, rel=1e-9)


def test_frechet_distance_of_sets_without_spread():
    first, second = FeatureStatistics.of(torch.zeros(5, 3)), FeatureStatistics.of(torch.ones(5, 3))
    assert frechet_distance(first, second) == pytest.approx(3)


def test_kernel_distance_by_hand():
    """One dimension, k(x, y) = (xy + 1)³: sets {0, 1} and {1, 2}."""
    within_first = 1.0  # k(0, 1)
    within_second = 27.0  # k(1, 2)
    between = (1 + 1 + 8 + 27) / 4  # k(0, 1), k(0, 2), k(1, 1), k(1, 2)
    mean, spread = kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]))
    assert mean == pytest.approx(within_first + within_second - 2 * between)
    assert spread == 0


def test_kernel_distance_by_subsets_estimates_that_of_all():
    first, second = normal(400, 6, seed=5), normal(300, 6, seed=6) + 0.4
    whole, _ = kernel_distance(first, second, subset_size=1000)
    mean, spread = kernel_distance(first, second, subset_size=100, subsets=200)
    assert spread > 0
    assert abs(mean - whole) < 4 * spread / math.sqrt(200) + 0.02 * whole
    assert kernel_distance(first, second, subset_size=100, subsets=3) == kernel_distance(
        first, second, subset_size=100, subsets=3
    )


def test_kernel_distance_is_unbiased():
    """Between samples of one distribution it is 0 on average, hence below 0 about as often as above."""
    values = [kernel_distance(normal(40, 5, seed=2 * i), normal(40, 5, seed=2 * i + 1))[0] for i in range(60)]
    assert 15 < sum(value < 0 for value in values) < 50


def test_inception_score_of_its_extremes():
    uniform, certain = torch.full((40, 5), 0.2), torch.eye(4).repeat(50, 1)
    assert inception_score(uniform)[0] == pytest.approx(1)
    assert inception_score(certain, splits=1) == pytest.approx((4, 0))
    assert inception_score(torch.eye(4)[:1].repeat(30, 1))[0] == pytest.approx(1)


def test_inception_score_by_hand():
    """Two images, (.9, .1) and (.5, .5): marginal (.7, .3)."""
    probabilities = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    first = 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    second = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    assert inception_score(probabilities, splits=1)[0] == pytest.approx(math.exp((first + second) / 2))


def test_precision_and_recall_by_hand():
    """On a line, k = 1: reference 0, 1, 10 has radii 1, 1, 9; images 1.5, 2.5, 30, 31 have radii 1, 1, 1, 1."""
    reference = torch.tensor([[0.0], [1.0], [10.0]])
    images = torch.tensor([[1.5], [2.5], [30.0], [31.0]])
    precision, recall = precision_recall(images, reference, nearest_k=1)
    assert precision == pytest.approx(2 / 4)  # 1.5 lies within 1 of 1 and 2.5 within 9 of 10
    assert recall == pytest.approx(1 / 3)  # only 1 lies within 1 of an image


def test_precision_and_recall_of_equal_and_of_distant_sets():
    features = normal(50, 3, seed=7)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 1000) == (0, 0)
