"""Accuracy of what prompts of the world of shapes ask for, by attribute and category, seen and unseen combinations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter

import torch
from torch import Tensor

from grpo.evaluation.sources import ImageSource, rank_and_size
from grpo.models import normalize
from grpo.parallel import gather_objects
from grpo.shapes import CATEGORIES, Scenes, category, is_unseen, parse, score

Read = Callable[[Tensor], Scenes]  # images [B, 3, H, W] in [-1, 1] -> what they show
PARTS = ("seen", "unseen")
"""Prompts whose combinations are all in the training split, and prompts that ask for one that is not."""


def measure_shapes(
    source: ImageSource,
    prompts: Sequence[str],
    readers: Mapping[str, Read],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, dict[str, float]]:
    """Shows every image once to every reader: by reader, the `accuracies`. Collective where a process group is up.

    Args:
        prompts: one text an image. Raises a UserError for one that is not of this world.
    """
    requests = [parse(text) for text in prompts]
    rank, ranks = rank_and_size()
    seen = []  # of each batch: its first image, and the scores of each reader
    for start in progress(range(0, len(source), batch_size)[rank::ranks]):
        images = normalize(source.pixels(start, start + batch_size).to(device).contiguous())
        asked = requests[start : start + len(images)]
        scores = {name: score(read(images), asked) for name, read in readers.items()}
        seen.append((start, {name: {key: v.cpu() for key, v in values.items()} for name, values in scores.items()}))
    batches = [scores for _, scores in sorted(chain(*gather_objects(seen)), key=itemgetter(0))]
    return {
        name: accuracies(
            {key: torch.cat([batch[name][key] for batch in batches]) for key in batches[0][name]}, requests
        )
        for name in readers
    }


def accuracies(scores: Mapping[str, Tensor], requests: Sequence) -> dict[str, float]:
    """Means of `grpo.shapes.score` over the prompts that say something of it.

    `all`: whether everything is right. `seen/ATTRIBUTE` and `unseen/ATTRIBUTE`: the same, and each attribute, over the
    prompts of seen or unseen combinations. `seen/CATEGORY` and `unseen/CATEGORY`: whether everything is right, over
    those of a category. What no prompt asks for is left out.
    """
    unseen = torch.tensor([is_unseen(request) for request in requests])
    kinds = torch.tensor([CATEGORIES.index(category(request)) for request in requests])
    found = {"all": scores["all"].mean().item()}
    for part, rows in zip(PARTS, (~unseen, unseen), strict=True):
        found |= {f"{part}/{name}": values[rows].nanmean().item() for name, values in scores.items()}
        of_kind = [(name, rows & (kinds == kind)) for kind, name in enumerate(CATEGORIES)]
        found |= {f"{part}/{name}": scores["all"][chosen].mean().item() for name, chosen in of_kind}
    return {name: value for name, value in found.items() if value == value}  # NaN is no number
