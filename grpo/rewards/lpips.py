"""How like the real image a completion looks to a network that was fitted to people's judgements."""

from torch import Tensor

from grpo.config import RewardTable
from grpo.models import load_lpips
from grpo.rewards.base import DecodedBatch, Reward, RewardContext


class PerceptualSimilarity(Reward):
    """Minus LPIPS (net vgg, version 0.1) to the real image."""

    class Settings(RewardTable):
        """Minus LPIPS, a learned perceptual distance, to the real image."""

        backbone: str | None = None
        """File of torchvision's VGG16, vgg16-397923af.pth. None looks for it where torch keeps its downloads, in
        hub/checkpoints of TORCH_HOME; nothing is downloaded."""

    needs = frozenset({"real_images"})

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.lpips = load_lpips(settings.backbone).to(context.device)
        self.lpips.backbone = context.prepare(self.lpips.backbone)
        self.networks = [self.lpips.backbone, *self.lpips.heads]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, at most 0."""
        real = self.lpips.features(batch.real_images)
        return -self.lpips.distance(self.lpips.features(batch.images), real, batch.image_of)
