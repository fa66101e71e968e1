"""From images to a dictionary of metrics; the work is spread over the ranks and the numbers do not depend on it."""

import math
from collections.abc import Callable, Iterable
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo.config import Evaluation, UserError
from grpo.evaluation import adm, distances
from grpo.evaluation.distances import FeatureStatistics
from grpo.evaluation.judges import Judge
from grpo.evaluation.sources import ImageSource, rank_and_size
from grpo.parallel import gather_objects


class Measured(NamedTuple):
    """What a judge saw in a set of images, the same on every rank.

    features       [N, D] fp32 on the CPU
    probabilities  [N, K] fp32 on the CPU
    rewards        [N] fp32, log p(class | image) under the rewarding classifier, or None without one
    class_ids      [N] int64, the class of each image if it is known and one of the judge's classes
    size           (height, width) of the images, pixels
    statistics     of the features of a larger set that the images stand for; None takes those of `features`
    spatial        [N, S] fp32 on the CPU, the judge's spatial features, or None without such
    spatial_statistics  as `statistics`, of the spatial features
    """

    features: Tensor
    probabilities: Tensor
    rewards: Tensor | None
    class_ids: Tensor | None
    size: tuple[int, int]
    statistics: FeatureStatistics | None = None
    spatial: Tensor | None = None
    spatial_statistics: FeatureStatistics | None = None

    def gaussian(self, device: torch.device | str) -> FeatureStatistics:
        """Mean and covariance of the features, or those that stand for them."""
        return _gaussian(self.features, self.statistics, device)

    def spatial_gaussian(self, device: torch.device | str) -> FeatureStatistics:
        """The same of the spatial features."""
        assert self.spatial is not None, "a judge without spatial features"
        return _gaussian(self.spatial, self.spatial_statistics, device)


def measure_images(
    source: ImageSource,
    judge: Judge,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    reward: Judge | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Measured:
    """Shows every image once to the judge. Collective where a process group is up.

    Batches are cut by image number before they are dealt to the ranks, so that each batch, hence each number, is the
    same for any number of ranks.

    Args:
        device: where the judge runs.
        reward: a classifier whose log p(class | image) is taken besides; needs the source's class ids.
        progress: wraps the loop over this rank's batches, to show how far it is.

    Raises:
        UserError: a reward without class ids, classes that a classifier does not know, or statistics of other features.
    """
    class_ids = source.class_ids
    if reward is not None and class_ids is None:
        raise UserError("evaluation.reward_checkpoint needs the images' classes: an .npz with arr_1, or class folders")
    rank, ranks = rank_and_size()
    seen = []  # of each batch: its first image, the size of the images, columns [B, ...] of results
    for start in progress(range(0, len(source), batch_size)[rank::ranks]):
        # Contiguous, since the judge's convolutions round differently for another memory layout.
        pixels = source.pixels(start, start + batch_size).to(device).contiguous()
        features, logits, *spatial = judge(pixels)
        if judge.names_classes and class_ids is not None:
            _require_classes(class_ids, logits, who="judging")
        columns = {"features": features, "probabilities": logits.softmax(dim=1)}
        if spatial:
            columns["spatial"] = spatial[0]
        if reward is not None and class_ids is not None:
            rewarding = reward(pixels)[1]
            _require_classes(class_ids, rewarding, who="rewarding")
            asked = class_ids[start : start + batch_size].to(device)
            columns["rewards"] = -F.cross_entropy(rewarding, asked, reduction="none")
        seen.append((start, tuple(pixels.shape[-2:]), {name: column.cpu() for name, column in columns.items()}))
    _, sizes, batches = zip(*sorted(chain(*gather_objects(seen)), key=itemgetter(0)), strict=True)
    whole = {name: torch.cat([columns[name] for columns in batches]) for name in batches[0]}
    statistics = source.inception_statistics if judge.is_inception else None
    spatial_statistics = source.spatial_statistics if judge.is_inception else None
    _require_size(statistics, whole["features"], names="mu and sigma")
    _require_size(spatial_statistics, whole.get("spatial"), names="mu_s and sigma_s")
    return Measured(
        features=whole["features"],
        probabilities=whole["probabilities"],
        rewards=whole.get("rewards"),
        spatial=whole.get("spatial"),
        class_ids=class_ids if judge.names_classes else None,
        size=sizes[0],
        statistics=statistics,
        spatial_statistics=spatial_statistics,
    )


def _require_classes(class_ids: Tensor, logits: Tensor, *, who: str) -> None:
    lowest, highest, num_classes = int(class_ids.min()), int(class_ids.max()), logits.shape[1]
    if lowest < 0 or highest >= num_classes:
        raise UserError(
            f"the images have classes {lowest}..{highest} and the {who} classifier {num_classes} classes: give one "
            "that was trained on these classes"
        )


def _require_size(statistics: FeatureStatistics | None, features: Tensor | None, *, names: str) -> None:
    """Published statistics are of the features that they are compared with."""
    if statistics is None or features is None or len(statistics.mean) == features.shape[1]:
        return
    raise UserError(
        f"the reference has {names} of {len(statistics.mean)} features, and Inception {features.shape[1]}: give an "
        f".npz with those of Inception, or without {names}"
    )


def compare(
    images: Measured, reference: Measured, *, settings: Evaluation | None = None, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Metrics of images against a reference that the same judge saw.

    Args:
        settings: nearest_k, kid_subset_size, kid_subsets, protocol of a recipe's section; None takes their defaults.
        device: where the arithmetic is done.

    Returns:
        fid, kid, kid_std, precision, recall, inception_score and inception_score_std in the judge's classes (see
        `distances`; under a protocol the last four are `adm`'s); sfid, by a judge with spatial features; accuracy where
        the images' classes are known; reward_mean and reward_std (population) with a reward.

    Raises:
        UserError: images of another size than the reference's, or too few of them.
    """
    settings = settings or Evaluation()
    if images.size != reference.size:
        first, second = (f"{width}x{height}" for height, width in (images.size, reference.size))
        raise UserError(
            f"images are {first} pixels and the reference {second}: set sampling.resize_to or data.image_size"
        )
    count, least = min(len(images.features), len(reference.features)), settings.nearest_k + 1
    if count < least:
        key = f"evaluation.nearest_k = {settings.nearest_k}"
        raise UserError(f"{count} images are too few: {key} takes {least} on each side")
    features = [side.features.to(device) for side in (images, reference)]
    metrics = {"fid": distances.frechet_distance(images.gaussian(device), reference.gaussian(device))}
    if images.spatial is not None:
        sides = (side.spatial_gaussian(device) for side in (images, reference))
        metrics["sfid"] = distances.frechet_distance(*sides)
    metrics["kid"], metrics["kid_std"] = distances.kernel_distance(
        *features, subset_size=settings.kid_subset_size, subsets=settings.kid_subsets
    )
    arithmetic = distances if settings.protocol == "none" else adm
    if all(bool(side.isfinite().all()) for side in features):
        pair = arithmetic.precision_recall(*features, nearest_k=settings.nearest_k)
    else:  # who is nobody's neighbour says nothing
        pair = (math.nan, math.nan)
    metrics["precision"], metrics["recall"] = pair
    metrics["inception_score"], metrics["inception_score_std"] = arithmetic.inception_score(images.probabilities)
    if images.class_ids is not None:
        metrics["accuracy"] = (images.probabilities.argmax(dim=1) == images.class_ids).double().mean().item()
    if images.rewards is not None:
        rewards = images.rewards.double()
        metrics["reward_mean"], metrics["reward_std"] = rewards.mean().item(), rewards.std(correction=0).item()
    return metrics


def _gaussian(features: Tensor, statistics: FeatureStatistics | None, device: torch.device | str) -> FeatureStatistics:
    if statistics is None:
        return FeatureStatistics.of(features.to(device))
    return FeatureStatistics(*(moment.to(device) for moment in statistics))


def classifier_gap(images: Measured) -> float:
    """How much surer of the class the rewarding classifier is than the judging one: mean difference of log p, nats."""
    assert images.class_ids is not None, "a reward needs classes"
    assert images.rewards is not None, "nothing was rewarded"
    judged = images.probabilities.gather(1, images.class_ids[:, None]).clamp_min(1e-12).log()
    return (images.rewards.mean() - judged.mean()).item()
