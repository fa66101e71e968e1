"""How much of what the caption asks for is drawn, in the world of shapes: a reward that can be verified."""

from collections.abc import Callable
from typing import Annotated, Literal

from torch import Tensor

from grpo.config import RewardTable, UserError
from grpo.config.types import Fraction, Wanted
from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.shapes import Fitting, load_reader, parse, reward, score
from grpo.shapes.world import Scenes


class ShapesReward(Reward):
    """The share of what the caption says that the image shows, in [0, 1], see `grpo.shapes.scoring`."""

    class Settings(RewardTable):
        """The share of what a caption of the world of shapes says that the image shows."""

        reader: Literal["fit", "network"] = "fit"
        """Who reads the image. fit: the renderer is fitted to it; network: what `grpo reader` writes."""
        checkpoint: Annotated[str | None, Wanted("weights of a reader of shapes")] = None
        """Weights of the network."""
        strictness: Fraction = 0.5
        """Share of the reward that is given only where everything is right; the rest is the mean over attributes."""

    needs = frozenset({"prompts"})

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.strictness = settings.strictness
        self.read: Callable[[Tensor], Scenes]
        if settings.reader == "fit":
            self.read = Fitting()
            return
        if settings.checkpoint is None:
            raise UserError('checkpoint is required with reader = "network": train one with grpo reader')
        reader = context.prepare(load_reader(settings.checkpoint))
        self.networks = [reader]
        self.read = lambda images: reader.read(images.to(context.dtype))

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32. Raises a UserError for a caption that is not of this world."""
        requests = [parse(text) for text in batch.captions]
        scores = score(self.read(batch.images), [requests[image] for image in batch.image_of.tolist()])
        return reward(scores, strictness=self.strictness)
