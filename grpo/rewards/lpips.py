"""How like the real image a completion looks to a network that was fitted to people's judgements."""

from collections.abc import Iterator

from torch import Tensor

from grpo.config import RewardTable
from grpo.config.types import Wanted, backbone_file
from grpo.models import load_lpips
from grpo.models.lpips import SMALLEST_SIDE
from grpo.rewards.base import DecodedBatch, Reward, RewardContext


class PerceptualSimilarity(Reward):
    """Minus LPIPS (net vgg, version 0.1) to the real image."""

    class Settings(RewardTable):
        """Minus LPIPS, a learned perceptual distance, to the real image."""

        backbone: str | None = None
        """File of torchvision's VGG16, vgg16-397923af.pth. None looks for it where torch keeps its downloads, in
        hub/checkpoints of TORCH_HOME; nothing is downloaded."""

        def files(self) -> Iterator[tuple[str, str, Wanted]]:
            yield backbone_file("backbone", self.backbone)

        def size_problems(self, *, image_size: int, completions: int) -> Iterator[str]:
            if image_size < SMALLEST_SIDE:
                yield f"LPIPS needs data.image_size of at least {SMALLEST_SIDE}, not {image_size}"

    needs = frozenset({"real_images"})

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.lpips = load_lpips(settings.backbone).to(context.device)
        self.lpips.backbone = context.prepare(self.lpips.backbone)
        self.networks = [self.lpips.backbone, *self.lpips.heads]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, at most 0."""
        real = self.lpips.features(batch.real_images)
        return -self.lpips.distance(self.lpips.features(batch.images), real, batch.image_of)
