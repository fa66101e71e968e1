"""A small convolutional classifier: it rewards a run, or judges images."""

import os
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.config import UserError
from grpo.formats import read_weights, require_finite
from grpo.models.class_names import written_names


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Sizes of a classifier."""

    width: int = 32  # channels of the first stage, a multiple of 8; each of the next two has twice as many
    num_classes: int = 10
    class_names: tuple[str, ...] | None = field(default=None, compare=False, metadata={"saved": True})  # by class id

    def __post_init__(self) -> None:
        if self.width % 8:
            raise ValueError(f"width {self.width} must be a multiple of 8")


class Stage(nn.Module):
    """Halve the image, then look at it once more: two normalised convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(x)))


class Classifier(nn.Module):
    """Images [B, 3, H, W] in [-1, 1], of any size, to logits [B, num_classes]."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = [3, config.width, 2 * config.width, 4 * config.width]
        self.layers = nn.Sequential(*(Stage(*pair) for pair in pairwise(widths)))
        self.head = nn.Linear(widths[-1], config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer decides on, [B, D] with D = 4 * width: the mean of the last stage over the image."""
        return self.layers(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def load_classifier(path: str | os.PathLike[str]) -> Classifier:
    """The classifier that the job `grpo classifier` wrote, in eval mode; its sizes all show in its weights.

    The names of its classes are there if they were written with the weights.

    Takes any layout of `read_weights`. Raises a UserError if there is none, or it is not that of a classifier.
    """
    weights = read_weights(path)
    require_finite(path, weights)
    try:
        width, num_classes = len(weights["layers.0.conv1.weight"]), len(weights["head.weight"])
        names = written_names(path, num_classes)
        with torch.device("meta"):  # the sizes may be anyone's, and are only allocated if they are the weights'
            model = Classifier(ClassifierConfig(width=width, num_classes=num_classes, class_names=names))
        model.load_state_dict(
            {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}, assign=True
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a classifier; train one with grpo classifier") from error
    return model.eval()
