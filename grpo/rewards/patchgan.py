"""How real a completion looks to the discriminator of a tokenizer's training."""

from typing import Annotated, Self

from torch import Tensor

from grpo.config import RewardTable, UserError
from grpo.config.types import PositiveInt, Wanted
from grpo.models import DiscriminatorConfig, load_discriminator
from grpo.rewards.base import DecodedBatch, Reward, RewardContext


class PatchGAN(Reward):
    """Mean logit of a PatchGAN discriminator over the patches of an image."""

    class Settings(RewardTable):
        """Mean logit of a PatchGAN discriminator."""

        checkpoint: Annotated[str | None, Wanted("a discriminator, as tokenizer training saves it")] = None
        """Its weights: a checkpoint of LlamaGen's tokenizer training, of which the key `discriminator` is read, or the
        discriminator.safetensors of a run of `grpo tokenizer`. Required while the weight is not 0."""
        dim: PositiveInt | None = None
        """Channels of its first layer; None is what is written with the weights, or else 64."""
        num_layers: PositiveInt | None = None
        """Its layers that halve the image; None is what is written with the weights, or else 3."""

        def resolved(self) -> Self:
            if self.weight and self.checkpoint is None:
                raise UserError("checkpoint: is required, a file with the weights of a discriminator")
            return self

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        given = {"width": settings.dim, "num_layers": settings.num_layers}
        given = {name: size for name, size in given.items() if size is not None}
        config = DiscriminatorConfig(**given) if given else None
        self.discriminator = context.prepare(load_discriminator(settings.resolved().checkpoint, config))
        self.networks = [self.discriminator]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        return self.discriminator(batch.images).float().mean(dim=(1, 2, 3))
