"""Random weights in the layout of torchvision's VGG16, for tests of LPIPS."""

from pathlib import Path

import torch
from torch import Tensor

CHANNELS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
            17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}  # fmt: skip
"""Place of each convolution in torchvision's `vgg16().features` -> its channels in and out."""


def random_vgg16() -> dict[str, Tensor]:
    """Convolutions of the real sizes; of the layers after them, which are the bulk, only the names."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for place, (inputs, outputs) in CHANNELS.items():
        scale = (2 / (9 * inputs)) ** 0.5
        weights[f"features.{place}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
        weights[f"features.{place}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    return weights | {f"classifier.{place}.{name}": torch.ones(1) for place in (0, 3, 6) for name in ("weight", "bias")}


def save_vgg16(path: Path) -> Path:
    """A bare state dict, as torchvision's download is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(random_vgg16(), path)
    return path
