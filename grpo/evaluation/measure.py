"""From images to a dictionary of metrics; the work is spread over the ranks and the numbers do not depend on it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.config import UserError
from grpo.evaluation.distances import (
    FeatureStatistics,
    accuracy,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from grpo.evaluation.judges import Judge, class_log_prob
from grpo.evaluation.sources import ImageSource
from grpo.parallel import broadcast_object

Layout = tuple[list[int], tuple[int, int]] | None  # columns of each part, and (height, width) of the images


class Measured(NamedTuple):
    """What a judge saw in a set of images, the same on every rank.

    Attributes:
        features: [N, D] fp32 on the CPU.
        probabilities: [N, K] fp32 on the CPU.
        rewards: [N] fp32, log p(class | image) under the rewarding classifier, or None without one.
        class_ids: [N] int64, the class of each image if it is known and one of the judge's classes.
        size: (height, width) of the images, pixels.
        statistics: of the features of a larger set that the images stand for; None takes those of `features`.
    """

    features: Tensor
    probabilities: Tensor
    rewards: Tensor | None
    class_ids: Tensor | None
    size: tuple[int, int]
    statistics: FeatureStatistics | None = None


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
        source: the images.
        judge: gives features and class probabilities.
        batch_size: images of one batch.
        device: where the judge runs.
        reward: a classifier whose log p(class | image) is taken besides; needs the source's class ids.
        progress: wraps the loop over this rank's batches, to show how far it is.

    Raises:
        UserError: a reward without class ids.
    """
    class_ids = source.class_ids
    if reward is not None and class_ids is None:
        raise UserError("evaluation.reward_checkpoint needs the images' classes: an .npz with arr_1, or class folders")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = range(0, len(source), batch_size)
    batches: list[tuple[int, Tensor]] = []
    layout = None
    for start in progress(starts[rank::world_size]):
        # Contiguous, since the judge's convolutions round differently for another memory layout.
        pixels = source.pixels(start, start + batch_size).to(device).contiguous()
        features, logits = judge(pixels)
        if judge.names_classes:
            _check_classes(class_ids, num_classes=logits.shape[1])
        columns = [features, logits.softmax(dim=1)]
        if reward is not None:
            columns.append(class_log_prob(reward, pixels, class_ids[start : start + batch_size].to(device))[:, None])
        batches.append((start, torch.cat(columns, dim=1).cpu()))
        layout = [column.shape[1] for column in columns], tuple(pixels.shape[-2:])
    seen, (widths, size) = _on_every_rank(batches, layout, length=len(source))
    features, probabilities, *rewards = seen.split(widths, dim=1)
    return Measured(
        features,
        probabilities,
        rewards=rewards[0][:, 0] if rewards else None,
        class_ids=class_ids if judge.names_classes else None,
        size=size,
        statistics=source.inception_statistics if judge.is_inception else None,
    )


def _check_classes(class_ids: Tensor | None, *, num_classes: int) -> None:
    if class_ids is not None and not 0 <= int(class_ids.min()) <= int(class_ids.max()) < num_classes:
        raise UserError(
            f"the images have classes {int(class_ids.min())}..{int(class_ids.max())} and the judging classifier "
            f"{num_classes} classes: give evaluation.feature_checkpoint one that was trained on these classes"
        )


def _on_every_rank(batches: list[tuple[int, Tensor]], layout: Layout, *, length: int) -> tuple[Tensor, Layout]:
    """Rows [length, columns] of all ranks in the order of the images, and their layout; rank 0 has the first batch."""
    if not dist.is_initialized():
        return torch.cat([rows for _, rows in batches]), layout
    layout = broadcast_object(layout)
    seen = torch.zeros(length, sum(layout[0]))
    for start, rows in batches:
        seen[start : start + len(rows)] = rows
    dist.all_reduce(seen)  # every row is zero on all ranks but one, so the sum is exact
    return seen, layout


def compare(
    images: Measured,
    reference: Measured,
    *,
    nearest_k: int = 3,
    kid_subset_size: int = 1000,
    kid_subsets: int = 100,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Metrics of images against a reference that the same judge saw.

    Returns:
        fid, kid, kid_std, precision, recall (see `distances`), inception_score and inception_score_std in the judge's
        classes; accuracy where the images' classes are known; reward_mean and reward_std (population) with a reward.

    Raises:
        UserError: images of another size than the reference's, or too few of them.
    """
    _check_comparable(images, reference, at_least=nearest_k + 1)
    features, reference_features = images.features.to(device), reference.features.to(device)
    metrics = {"fid": frechet_distance(*(_statistics(side, device) for side in (images, reference)))}
    metrics["kid"], metrics["kid_std"] = kernel_distance(
        features, reference_features, subset_size=kid_subset_size, subsets=kid_subsets
    )
    metrics["precision"], metrics["recall"] = precision_recall(features, reference_features, nearest_k=nearest_k)
    metrics["inception_score"], metrics["inception_score_std"] = inception_score(images.probabilities)
    if images.class_ids is not None:
        metrics["accuracy"] = accuracy(images.probabilities, images.class_ids)
    if images.rewards is not None:
        rewards = images.rewards.double()
        metrics["reward_mean"], metrics["reward_std"] = rewards.mean().item(), rewards.std(correction=0).item()
    return metrics


def evaluate_images(
    source: ImageSource,
    reference: ImageSource | Measured,
    judge: Judge,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    reward: Judge | None = None,
    nearest_k: int = 3,
    kid_subset_size: int = 1000,
    kid_subsets: int = 100,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, float]:
    """`measure_images` of both sides, then `compare` on the main rank; every rank gets the result.

    Args:
        reference: images, or what `measure_images` returned for them, to be used for several comparisons.
    """
    if not isinstance(reference, Measured):
        reference = measure_images(reference, judge, batch_size=batch_size, device=device, progress=progress)
    images = measure_images(source, judge, batch_size=batch_size, device=device, reward=reward, progress=progress)
    if dist.is_initialized() and dist.get_rank() != 0:
        return broadcast_object(None)
    metrics = compare(
        images,
        reference,
        nearest_k=nearest_k,
        kid_subset_size=kid_subset_size,
        kid_subsets=kid_subsets,
        device=device,
    )
    return broadcast_object(metrics) if dist.is_initialized() else metrics


def _statistics(measured: Measured, device: torch.device | str) -> FeatureStatistics:
    if measured.statistics is None:
        return FeatureStatistics.of(measured.features.to(device))
    return FeatureStatistics(*(moment.to(device) for moment in measured.statistics))


def _check_comparable(images: Measured, reference: Measured, *, at_least: int) -> None:
    if images.size != reference.size:
        sizes = [f"{width}x{height}" for height, width in (images.size, reference.size)]
        raise UserError(
            f"images are {sizes[0]} pixels and the reference {sizes[1]}: set sampling.resize_to or data.image_size"
        )
    count = min(len(images.features), len(reference.features))
    if count < at_least:
        raise UserError(
            f"{count} images are too few: evaluation.nearest_k = {at_least - 1} takes {at_least} on each side"
        )
