"""Minus the distance to the real image, in pixels or in the tokenizer's latents."""

from torch import Tensor
from torch.nn import functional as F

from grpo.models import VQModel
from grpo.rewards.base import Completions


class Reconstruction:
    """Minus the mean absolute (l1) or mean squared (l2) error over all pixels and channels."""

    name = "reconstruction"

    def __init__(self, distance: str) -> None:
        self.distance = F.l1_loss if distance == "l1" else F.mse_loss

    def __call__(self, completions: Completions) -> Tensor:
        """-> [n] fp32, at most 0."""
        real = completions.real_images[completions.image_of]
        error = self.distance(completions.images.float(), real.float(), reduction="none")
        return -error.mean(dim=(1, 2, 3))


class EmbeddingCosine:
    """Cosine between a completion's code vectors and the real image's latents before quantisation, minus 1."""

    name = "embedding_cosine"

    def __init__(self, tokenizer: VQModel) -> None:
        self.tokenizer = tokenizer

    def __call__(self, completions: Completions) -> Tensor:
        """-> [n] fp32 in [-2, 0]."""
        latents = self.tokenizer.encode_latents(completions.real_images.to(completions.images.dtype))  # [b, C, h, w]
        codes = self.tokenizer.lookup(completions.tokens)  # [n, C, h, w]
        target = latents.flatten(1).float()[completions.image_of]
        return F.cosine_similarity(codes.flatten(1).float(), target, dim=1) - 1.0
