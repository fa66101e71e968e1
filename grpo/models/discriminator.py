"""The PatchGAN discriminator of LlamaGen's tokenizer training (Isola et al., arXiv 1611.07004)."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo.config import UserError
from grpo.config.types import DiscriminatorLayers, DiscriminatorWidth
from grpo.formats import read_weights, require_finite
from grpo.models.weights import read_sizes

KEY = "discriminator"  # of a checkpoint of tokenizer training
WIDEST = 8  # layers get no wider than so many times the first


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Sizes of a discriminator; the defaults are LlamaGen's."""

    width: DiscriminatorWidth = 64  # channels of the first layer; each of the next has twice as many, up to 8 times
    num_layers: DiscriminatorLayers = 3  # that halve the image

    @property
    def smallest_side(self) -> int:
        """Pixels that an image needs each way: two more layers look at 4 x 4 places beside a border of one."""
        return 3 * 2**self.num_layers


class Discriminator(nn.Module):
    """Images [n, 3, H, W] in [-1, 1] to logits [n, 1, h, w]: how real each patch looks. The names are LlamaGen's."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * min(2**level, WIDEST) for level in range(config.num_layers + 1)]
        self.main = nn.Sequential(nn.Conv2d(3, widths[0], kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2))
        for level in range(1, len(widths)):
            stride = 2 if level < config.num_layers else 1
            conv = nn.Conv2d(widths[level - 1], widths[level], kernel_size=4, stride=stride, padding=1, bias=False)
            self.main.extend([conv, nn.BatchNorm2d(widths[level]), nn.LeakyReLU(0.2)])
        self.main.append(nn.Conv2d(widths[-1], 1, kernel_size=4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Raises a UserError if the images are too small for the network."""
        smallest = self.config.smallest_side
        if min(images.shape[2:]) < smallest:
            size = f"{images.shape[3]} x {images.shape[2]}"
            raise UserError(f"this discriminator needs images of at least {smallest} pixels each way, not {size}")
        return self.main(images)


def discriminator_sizes(path: str | os.PathLike[str]) -> DiscriminatorConfig:
    """Those written with the weights, or else LlamaGen's. Raises a UserError if they are damaged."""
    return read_sizes(path, DiscriminatorConfig, what="a discriminator") or DiscriminatorConfig()


def load_discriminator(path: str | os.PathLike[str], config: DiscriminatorConfig | None = None) -> Discriminator:
    """A discriminator in eval mode, in fp32 on the CPU.

    Args:
        path: a checkpoint of LlamaGen's tokenizer training, whose key `discriminator` is read, or the file
            `discriminator.safetensors` of a run of `grpo tokenizer`.
        config: its sizes; None takes those written with the weights, or else LlamaGen's.

    Raises:
        UserError: there are no such weights, or they are not exactly those of such a discriminator.
    """
    weights = read_weights(path, key=KEY)
    require_finite(path, weights)
    config = config or discriminator_sizes(path)
    with torch.device("meta"):
        model = Discriminator(config)
    try:
        model.load_state_dict(
            {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}, assign=True
        )
    except RuntimeError as error:
        wanted = f"a PatchGAN discriminator of width {config.width} and {config.num_layers} layers"
        raise UserError(f"{path}: not the weights of {wanted}{_found(weights)}") from error
    return model.eval()


def _found(weights: dict[str, Tensor]) -> str:
    """What sizes the weights have, if they are those of a discriminator at all."""
    convolutions = [weight for weight in weights.values() if weight.ndim == 4]
    first = weights.get("main.0.weight")
    if first is None or first.ndim != 4 or len(convolutions) < 3:
        return ""
    return f": they look like those of width {len(first)} and {len(convolutions) - 2} layers"
