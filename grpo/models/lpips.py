"""LPIPS, a learned perceptual distance between images (Zhang et al., arXiv 1801.03924): net vgg, version 0.1."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from grpo.config import UserError
from grpo.config.types import VGG16 as BACKBONE
from grpo.config.types import lpips_backbone
from grpo.formats import read_weights, require_finite

SMALLEST_SIDE = 16  # pixels; four poolings leave one
_EPS = 1e-10  # added to the length of a feature vector, as the package `lpips` does
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # output channels


class VGGStages(nn.Module):
    """The convolutions of VGG16, under torchvision's names: scaled images to the last features of its five stages."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.ends: list[int] = []  # the last layer of each stage
        inputs = 3
        for stage in _STAGES:
            if self.ends:
                self.features.append(nn.MaxPool2d(2))
            for outputs in stage:
                self.features.extend([nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.ReLU(inplace=True)])
                inputs = outputs
            self.ends.append(len(self.features) - 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[n, 3, H, W] -> five times [n, C, h, w]."""
        features = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                features.append(x)
        return features


class Head(nn.Module):
    """One stage's part of the distance, in fp32: what each channel's squared difference counts, mean over places."""

    weight: Tensor  # [C, 1, 1]

    def __init__(self, weight: Tensor) -> None:
        """`weight` [C]."""
        super().__init__()
        self.register_buffer("weight", weight.float().view(-1, 1, 1))

    def forward(self, features: Tensor, real: Tensor, image_of: Tensor) -> Tensor:
        """[n, C, h, w], [b, C, h, w], [n] int64 -> [n]."""
        squared = (_unit(features) - _unit(real)[image_of]).square()
        return (squared * self.weight).sum(dim=1).mean(dim=(1, 2))


class LPIPS(nn.Module):
    """Images and real images, [n, 3, H, W] in [-1, 1], to their distances [n] fp32.

    `features` and `distance` are the two halves, for real images that several images are compared with. The backbone
    may be cast, compiled or run under autocast; scaling, norms and sums stay fp32. Gradients reach the images.
    """

    shift: Tensor  # [3, 1, 1]
    scale: Tensor  # [3, 1, 1]

    def __init__(self, backbone: VGGStages, head_weights: Sequence[Tensor]) -> None:
        """`head_weights` [C] of each stage."""
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(map(Head, head_weights))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Five stages, [n, C, h, w] each, of images [n, 3, H, W]. A UserError if they are too small for the network."""
        if min(images.shape[2:]) < SMALLEST_SIDE:
            size = f"{images.shape[3]} x {images.shape[2]}"
            raise UserError(f"LPIPS needs images of at least {SMALLEST_SIDE} pixels each way, not {size}")
        scaled = (images.float() - self.shift) / self.scale
        return self.backbone(scaled.to(next(self.backbone.parameters()).dtype))

    def distance(self, features: Sequence[Tensor], real: Sequence[Tensor], image_of: Tensor | None = None) -> Tensor:
        """[n] fp32, from the features of n images and of b real ones; `image_of` [n] int64 says whose each is."""
        if image_of is None:
            image_of = torch.arange(len(features[0]), device=features[0].device)
        stages = zip(self.heads, features, real, strict=True)
        return torch.stack([head(x, y, image_of) for head, x, y in stages]).sum(dim=0)

    def forward(self, images: Tensor, real_images: Tensor) -> Tensor:
        return self.distance(self.features(images), self.features(real_images))


def load_lpips(backbone_path: str | os.PathLike[str] | None = None, *, key: str = "backbone") -> LPIPS:
    """LPIPS in eval mode, frozen, in fp32 on the CPU; nothing is downloaded.

    Args:
        backbone_path: torchvision's weights of VGG16; None looks for `BACKBONE` where torch keeps its downloads
            (hub/checkpoints in TORCH_HOME). The heads are those of the installed package `lpips`.
        key: of a recipe, that names the file, for the message.

    Raises:
        UserError: a file is missing, or does not hold exactly these weights.
    """
    path = Path(lpips_backbone(backbone_path))
    if not path.is_file():
        remedy = "check the path" if backbone_path else f"put it there, set TORCH_HOME, or give its path as `{key}`"
        raise UserError(f"LPIPS needs torchvision's VGG16, {BACKBONE}: no file {path}; {remedy}")
    with torch.device("meta"):
        backbone = VGGStages()
    weights = {name: w.float() for name, w in read_weights(path).items() if not name.startswith("classifier.")}
    try:
        backbone.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: not the weights of torchvision's VGG16 ({BACKBONE}): {_first(error)}") from error
    require_finite(path, weights)
    return LPIPS(backbone, _published_heads()).eval().requires_grad_(False)


def _published_heads() -> list[Tensor]:
    """The published weights [C] of each stage, from the folder of the package `lpips`, which is not imported."""
    package = find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise UserError("LPIPS takes its heads from the package lpips, which is not installed: pip install lpips")
    path = Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
    weights = read_weights(path)
    expected = {f"lin{index}.model.1.weight": (1, stage[-1], 1, 1) for index, stage in enumerate(_STAGES)}
    if {name: tuple(weight.shape) for name, weight in weights.items()} != expected:
        raise UserError(f"{path}: not the heads of LPIPS 0.1 for VGG16; install the package lpips anew")
    return [weights[name].flatten() for name in expected]


def _unit(features: Tensor) -> Tensor:
    """Feature vectors of length 1. The gradient of a zero vector is 0, where that of a plain root would be NaN."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _EPS)


def _first(error: RuntimeError) -> str:
    """The first thing that `load_state_dict` found."""
    return str(error).splitlines()[1].strip().rstrip(".")[:200]
