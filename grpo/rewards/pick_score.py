"""How much people would pick an image for the words that asked for it, as PickScore learned it (arXiv 2305.01569)."""

from typing import Annotated

from torch import Tensor

from grpo.config.types import Wanted
from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.clip_networks import CLIPScorer
from grpo.rewards.words import WordsTable

UNIT = 26  # brings the scores of good images near 1


class PickScore(Reward):
    """exp(logit scale) x cosine / 26 in PickScore's CLIP."""

    class Settings(WordsTable):
        """Human preference score PickScore_v1."""

        checkpoint: Annotated[str, Wanted("the folder of PickScore_v1, with config.json and model.safetensors")]
        """The folder of `PickScore_v1`: config.json and model.safetensors of a CLIP-H."""

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.settings = settings
        self.scorer = CLIPScorer.of(context, settings.checkpoint, "ViT-H-14")
        self.networks = [self.scorer.network.images]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        cosines = self.scorer.cosines(batch.images, self.settings.texts(batch), batch.image_of)
        return self.scorer.scale * cosines / UNIT
