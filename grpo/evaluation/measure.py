"""From images to a dictionary of metrics; the work is spread over the ranks and the numbers do not depend on it."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from grpo.config import Evaluation, UserError
from grpo.evaluation.distances import (
    FeatureStatistics,
    accuracy,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from grpo.evaluation.judges import Judge
from grpo.evaluation.sources import ImageSource, rank_and_size
from grpo.parallel import broadcast_object


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
    rank, ranks = rank_and_size()
    seen = {}
    for start in progress(range(0, len(source), batch_size)[rank::ranks]):
        # Contiguous, since the judge's convolutions round differently for another memory layout.
        pixels = source.pixels(start, start + batch_size).to(device).contiguous()
        features, logits = judge(pixels)
        if judge.names_classes:
            _check_classes(class_ids, num_classes=logits.shape[1])
        columns = [features, logits.softmax(dim=1)]
        if reward is not None:
            asked = class_ids[start : start + batch_size].to(device)
            columns.append(-F.cross_entropy(reward(pixels)[1], asked, reduction="none"))
        seen[start] = pixels.shape[-2:], [column.cpu() for column in columns]
    seen = _of_all_ranks(seen)
    features, probabilities, *rewards = (torch.cat(column) for column in zip(*(rows for _, rows in seen), strict=True))
    return Measured(
        features,
        probabilities,
        rewards=rewards[0] if rewards else None,
        class_ids=class_ids if judge.names_classes else None,
        size=tuple(seen[0][0]),
        statistics=source.inception_statistics if judge.is_inception else None,
    )


def _check_classes(class_ids: Tensor | None, *, num_classes: int) -> None:
    if class_ids is not None and not 0 <= int(class_ids.min()) <= int(class_ids.max()) < num_classes:
        raise UserError(
            f"the images have classes {int(class_ids.min())}..{int(class_ids.max())} and the judging classifier "
            f"{num_classes} classes: give evaluation.feature_checkpoint one that was trained on these classes"
        )


def _of_all_ranks(seen: dict[int, tuple]) -> list[tuple]:
    """The batches of all ranks, in the order of the images."""
    parts = [seen]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, seen)
    together = {start: batch for part in parts for start, batch in part.items()}
    return [together[start] for start in sorted(together)]


def compare(
    images: Measured, reference: Measured, *, settings: Evaluation | None = None, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Metrics of images against a reference that the same judge saw.

    Args:
        settings: a recipe's section, for nearest_k, kid_subset_size and kid_subsets; None takes their defaults.
        device: where the arithmetic is done.

    Returns:
        fid, kid, kid_std, precision, recall (see `distances`), inception_score and inception_score_std in the judge's
        classes; accuracy where the images' classes are known; reward_mean and reward_std (population) with a reward.

    Raises:
        UserError: images of another size than the reference's, or too few of them.
    """
    settings = settings or Evaluation()
    nearest_k = settings.nearest_k
    _check_comparable(images, reference, at_least=nearest_k + 1)
    features, reference_features = images.features.to(device), reference.features.to(device)
    metrics = {"fid": frechet_distance(*(_statistics(side, device) for side in (images, reference)))}
    metrics["kid"], metrics["kid_std"] = kernel_distance(
        features, reference_features, subset_size=settings.kid_subset_size, subsets=settings.kid_subsets
    )
    metrics["precision"], metrics["recall"] = precision_recall(features, reference_features, nearest_k=nearest_k)
    metrics["inception_score"], metrics["inception_score_std"] = inception_score(images.probabilities)
    if images.class_ids is not None:
        metrics["accuracy"] = accuracy(images.probabilities, images.class_ids)
    if images.rewards is not None:
        rewards = images.rewards.double()
        metrics["reward_mean"], metrics["reward_std"] = rewards.mean().item(), rewards.std(correction=0).item()
    return metrics


def classifier_gap(images: Measured) -> float:
    """How much surer of the class the rewarding classifier is than the judging one: mean difference of log p, nats."""
    judged = images.probabilities.gather(1, images.class_ids[:, None]).clamp_min(1e-12).log()
    return (images.rewards.mean() - judged.mean()).item()


def evaluate_images(
    source: ImageSource,
    reference: ImageSource | Measured,
    judge: Judge,
    *,
    settings: Evaluation | None = None,
    device: torch.device | str = "cpu",
    reward: Judge | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, float]:
    """`measure_images` of both sides, then `compare` on the main rank; every rank gets the result.

    Args:
        reference: images, or what `measure_images` returned for them, to be used for several comparisons.
        settings: a recipe's section; of it the batch size and what `compare` takes.
    """
    settings = settings or Evaluation()
    look = partial(measure_images, judge=judge, batch_size=settings.batch_size, device=device, progress=progress)
    if not isinstance(reference, Measured):
        reference = look(reference)
    images = look(source, reward=reward)
    rank, ranks = rank_and_size()
    metrics = compare(images, reference, settings=settings, device=device) if rank == 0 else None
    return broadcast_object(metrics) if ranks > 1 else metrics


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
