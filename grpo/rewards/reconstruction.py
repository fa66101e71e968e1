"""Minus the distance to the real image, in pixels."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from grpo.config import RewardTable
from grpo.rewards.base import DecodedBatch, Reward, RewardContext


class Reconstruction(Reward):
    """Minus the mean absolute (l1) or mean squared (l2) error over all pixels and channels."""

    class Settings(RewardTable):
        """Nearness to the real image."""

        distance: Literal["l1", "l2"] = "l2"
        """Mean absolute or mean squared error over pixels in [-1, 1]."""

    needs = frozenset({"real_images"})

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.distance = F.l1_loss if settings.distance == "l1" else F.mse_loss

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, at most 0."""
        real = batch.real_images[batch.image_of]
        error = self.distance(batch.images.float(), real.float(), reduction="none")
        return -error.mean(dim=(1, 2, 3))
