"""How well an image fits the words that asked for it, under a CLIP network."""

from typing import Annotated

from pydantic import FiniteFloat, model_validator
from torch import Tensor

from grpo.config.types import Wanted
from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.clip_networks import CLIPScorer, Resize, quantised
from grpo.rewards.words import WordsTable


class CosineTable(WordsTable):
    """What every reward by the cosine of an image and a text has."""

    scale: FiniteFloat = 1.0
    """Factor of the cosine."""
    quantised: bool = False
    """AR-GRPO's levels of the cosine instead: -1 below 0, .5 below .3, 1 below .6, else 1.5; `scale` has no part."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "CosineTable":
        if self.quantised and self.scale != type(self).model_fields["scale"].default:
            raise ValueError("scale has no effect on quantised scores; leave it out, or set weight")
        return self


class CosineReward(Reward):
    """The cosine of an image's and its text's features in a CLIP, or its levels."""

    scorer: CLIPScorer

    def __init__(self, settings: CosineTable, scorer: CLIPScorer) -> None:
        self.settings, self.scorer = settings, scorer
        self.networks = [scorer.network.images]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, between -scale and scale, or a level."""
        cosines = self.scorer.cosines(batch.images, self.settings.texts(batch), batch.image_of)
        return quantised(cosines) if self.settings.quantised else self.settings.scale * cosines


class CLIP(CosineReward):
    """Cosine in a CLIP network; by default AR-GRPO's reward (arXiv 2508.06924): 5 x cosine with "a photo of {}"."""

    class Settings(CosineTable):
        """How well an image fits its words under a CLIP."""

        checkpoint: Annotated[str, Wanted("open_clip_model.safetensors, or the folder of clip-vit-base-patch32")]
        """A file of open_clip's weights, or a folder of transformers' (config.json, model.safetensors)."""
        model: str = "ViT-B-32-quickgelu"
        """open_clip's name of the architecture of a file; OpenAI's weights need one that ends in -quickgelu."""
        resize: Resize = "crop"
        """CLIP's own (bicubic, the middle), or squashed to a square (bilinear without antialias), as LOO-FID does."""
        scale: FiniteFloat = 5.0
        """Factor of the cosine."""

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        super().__init__(settings, CLIPScorer.of(context, settings.checkpoint, settings.model, resize=settings.resize))
