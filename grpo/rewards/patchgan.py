"""How real a completion looks to the discriminator of a tokenizer's training."""

from collections.abc import Iterator
from typing import Annotated, Self

from torch import Tensor

from grpo.config import RewardTable, UserError
from grpo.config.types import DiscriminatorLayers, DiscriminatorWidth, Wanted, exists
from grpo.models import DiscriminatorConfig, load_discriminator
from grpo.models.discriminator import discriminator_sizes
from grpo.rewards.base import DecodedBatch, Reward, RewardContext


class PatchGAN(Reward):
    """Mean logit of a PatchGAN discriminator over the patches of an image."""

    class Settings(RewardTable):
        """Mean logit of a PatchGAN discriminator."""

        checkpoint: Annotated[str | None, Wanted("a discriminator, as tokenizer training saves it")] = None
        """Its weights: a checkpoint of LlamaGen's tokenizer training, of which the key `discriminator` is read, or the
        discriminator.safetensors of a run of `grpo tokenizer`. Required while the weight is not 0."""
        dim: DiscriminatorWidth | None = None
        """Channels of its first layer; None is what is written with the weights, or else 64."""
        num_layers: DiscriminatorLayers | None = None
        """Its layers that halve the image; None is what is written with the weights, or else 3."""

        def resolved(self) -> Self:
            if self.weight and self.checkpoint is None:
                raise UserError("checkpoint: is required, a file with the weights of a discriminator")
            return self

        def given_sizes(self) -> DiscriminatorConfig | None:
            """Those that the table says; None where it says none."""
            sizes = {"width": self.dim, "num_layers": self.num_layers}
            given = {name: size for name, size in sizes.items() if size is not None}
            return DiscriminatorConfig(**given) if given else None

        def size_problems(self, *, image_size: int, completions: int) -> Iterator[str]:
            sizes = self.given_sizes()
            if sizes is None and self.checkpoint is not None and exists(self.checkpoint):
                try:
                    sizes = discriminator_sizes(self.checkpoint)
                except UserError as error:
                    yield from error.problems
            if sizes is not None and image_size < sizes.smallest_side:
                needed = f"data.image_size of at least {sizes.smallest_side}, not {image_size}"
                yield f"a discriminator of {sizes.num_layers} layers needs {needed}"

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        assert settings.checkpoint is not None, "`resolved` requires it"
        network = load_discriminator(settings.checkpoint, settings.given_sizes())
        self.discriminator = context.prepare(network)
        self.networks = [self.discriminator]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        return self.discriminator(batch.images).float().mean(dim=(1, 2, 3))
