"""What a reward sees and what it is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Completions:
    """A batch of decoded completions and the real images that they belong to, n completions of any images."""

    images: Tensor
    """[n, 3, H, W] decoded, in [-1, 1] up to the decoder's overshoot."""
    tokens: Tensor
    """[n, T] int64."""
    class_ids: Tensor
    """[n] int64."""
    real_images: Tensor
    """[n, 3, H, W] in [-1, 1]; of the same class, and in teacher forcing the image itself."""


class Reward(Protocol):
    """A reward: higher is better, one number a completion, no gradient.

    A reward may depend on nothing but its own completion, so that batches can be cut anywhere.
    """

    name: str

    def __call__(self, completions: Completions) -> Tensor:
        """-> [n] fp32."""
        ...
