"""How beautiful people found such an image, as LAION's aesthetic predictor learned it."""

from typing import Annotated

from torch import Tensor

from grpo.config import RewardTable
from grpo.config.types import Wanted
from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.clip_networks import CLIPScorer
from grpo.rewards.linear_chain import LinearChain
from grpo.rewards.published_weights import load_strictly, read_published


class Aesthetic(Reward):
    """LAION's aesthetic score, about 1 to 10: a linear function of the direction of the CLIP L/14 feature."""

    class Settings(RewardTable):
        """LAION's aesthetic score."""

        checkpoint: Annotated[str, Wanted("sac+logos+ava1-l14-linearMSE.pth")]
        """`sac+logos+ava1-l14-linearMSE.pth`."""
        clip_checkpoint: Annotated[str, Wanted("open_clip_model.safetensors, or the folder of clip-vit-large-patch14")]
        """OpenAI's CLIP ViT-L/14: a file of open_clip's weights, or a folder of transformers'."""
        clip_model: str = "ViT-L-14-quickgelu"
        """open_clip's name of the architecture of a file."""

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.scorer = CLIPScorer.of(context, settings.clip_checkpoint, settings.clip_model)
        what = f"the aesthetic predictor of {settings.clip_model}"
        self.chain = LinearChain(self.scorer.network.width).eval().requires_grad_(False)
        load_strictly(self.chain, read_published(settings.checkpoint), settings.checkpoint, what=what)
        self.chain.to(context.device)  # in fp32: bf16 would round scores to 1/32
        self.networks = [self.scorer.network.images]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        return self.chain(self.scorer.images(batch.images)).squeeze(1)
