"""How much people would like an image for the words that asked for it, as HPSv2.1 learned it (arXiv 2306.09341)."""

from typing import Annotated

from grpo.config.types import Wanted
from grpo.rewards.base import RewardContext
from grpo.rewards.clip import CosineReward, CosineTable
from grpo.rewards.clip_networks import CLIPScorer


class HPSv2(CosineReward):
    """The cosine in HPSv2.1's CLIP, without its logit scale: about .2 to .35."""

    class Settings(CosineTable):
        """Human preference score HPSv2.1."""

        checkpoint: Annotated[str, Wanted("HPS_v2.1_compressed.pt")]
        """`HPS_v2.1_compressed.pt`, a ViT-H-14 under the key `state_dict`."""
        model: str = "ViT-H-14"
        """open_clip's name of the architecture."""

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        super().__init__(settings, CLIPScorer.of(context, settings.checkpoint, settings.model))
