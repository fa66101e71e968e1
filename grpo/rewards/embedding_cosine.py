"""How well the codes of a completion point along the latents of the real image."""

from torch import Tensor
from torch.nn import functional as F

from grpo.config import RewardTable
from grpo.rewards.base import DecodedBatch, Reward, RewardContext


class EmbeddingCosine(Reward):
    """Cosine between a completion's code vectors and the real image's latents before quantisation, minus 1."""

    needs = frozenset({"real_images"})

    def __init__(self, settings: RewardTable, context: RewardContext) -> None:
        self.tokenizer = context.tokenizer
        self.networks = [context.tokenizer.encoder]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32 in [-2, 0]."""
        latents = self.tokenizer.encode_latents(batch.real_images.to(batch.images.dtype))  # [b, C, h, w]
        codes = self.tokenizer.lookup(batch.tokens)  # [n, C, h, w]
        target = latents.flatten(1).float()[batch.image_of]
        return F.cosine_similarity(codes.flatten(1).float(), target, dim=1) - 1.0
