"""What a reward sees and what it is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Completions:
    """A batch of decoded completions and the real images that they belong to: n completions of b images."""

    images: Tensor
    """[n, 3, H, W] decoded, in [-1, 1] up to the decoder's overshoot, in the precision of the rewards' networks."""
    tokens: Tensor
    """[n, T] int64."""
    class_ids: Tensor
    """[n] int64."""
    real_images: Tensor
    """[b, 3, H, W] fp32 in [-1, 1], each once; of the same class, and in teacher forcing the image itself."""
    image_of: Tensor
    """[n] int64, the real image of each completion."""


class Reward(Protocol):
    """A reward: higher is better, one number a completion, no gradient.

    A reward may depend on nothing but its own completion and that one's image, so that batches can be cut anywhere.
    What is computed from real images should be computed from `real_images` and then indexed by `image_of`.
    """

    name: str

    def __call__(self, completions: Completions) -> Tensor:
        """-> [n] fp32."""
        ...
