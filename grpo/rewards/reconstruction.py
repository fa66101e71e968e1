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
        error = self.distance(completions.images.float(), completions.real_images.float(), reduction="none")
        return -error.mean(dim=(1, 2, 3))


class EmbeddingCosine:
    """Cosine between a completion's code vectors and the real image's latents before quantisation, minus 1."""

    name = "embedding_cosine"

    def __init__(self, tokenizer: VQModel) -> None:
        self.tokenizer = tokenizer

    def __call__(self, completions: Completions) -> Tensor:
        """-> [n] fp32 in [-2, 0]."""
        latents = self.tokenizer.encode_latents(completions.real_images).flatten(1).float()
        codes = self.tokenizer.lookup(completions.tokens).flatten(1).float()
        return F.cosine_similarity(codes, latents, dim=1) - 1.0
