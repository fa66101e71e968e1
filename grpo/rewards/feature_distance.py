"""Minus the distance to the real image as a network sees it."""

from torch import Tensor

from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.image_network import ImageNetwork, NetworkTable


class FeatureDistance(Reward):
    """Minus the squared distance, summed over the features that a network's last layer decides on."""

    class Settings(NetworkTable):
        """Nearness to the real image in the features of a network, such as timm's DINO."""

    needs = frozenset({"real_images"})

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.network = ImageNetwork(settings, context, output="features")
        self.networks = [self.network.network]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, at most 0."""
        real = self.network(batch.real_images)  # [b, D], once each
        return -(self.network(batch.images) - real[batch.image_of]).square().sum(dim=1)
