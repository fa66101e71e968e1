"""Networks that look at images, by name and from local weights, each with its own pre-processing.

The project's classifier, any classification network of torchvision, any network of timm. Nothing is downloaded, and a
library is imported only for a network of its own.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from annotated_types import Len
from pydantic import BeforeValidator, FiniteFloat
from torch import Tensor, nn
from torch.nn import functional as F

from grpo.config import RewardTable, UserError, import_extra
from grpo.config.types import NetworkSide, Wanted
from grpo.models import load_classifier, to_uint8
from grpo.rewards.base import RewardContext
from grpo.rewards.published_weights import load_strictly, read_published
from grpo.rewards.resizing import resize_as_pillow

Output = Literal["features", "logits"]
Interpolation = Literal["bilinear", "bicubic"]
OWN = "classifier"
TRANSFORMS_INPUT = ("inception_v3", "googlenet")  # torchvision's weights of these go with its switch transform_input


def _split_flag_text(value: object) -> object:
    """A list reaches a flag as text, `.5,.5,.5`; a recipe file gives a list."""
    return value.split(",") if isinstance(value, str) else value


Channels = Annotated[list[FiniteFloat], BeforeValidator(_split_flag_text), Len(3, 3)]


class Preprocessing(NamedTuple):
    """What is done to an image before a network sees it."""

    resize: int | None  # side, or the shorter one; None keeps the image as it is
    crop: int | None  # side of the square in the middle
    interpolation: Interpolation
    mean: list[float]  # of red, green and blue in [0, 1]
    std: list[float]


class NetworkTable(RewardTable):
    """The keys of a reward that looks through a network. Loaded from a recipe, its pre-processing is written out."""

    net: str = OWN
    """classifier: what `grpo classifier` writes; torchvision:NAME or timm:NAME: a network of that library."""
    checkpoint: Annotated[str, Wanted("weights of the network that net names")]
    """Its weights, as that library publishes them."""
    resize: NetworkSide | None = None
    """Images are resized to this side; none is what the network was trained with (a classifier of ours: not at all)."""
    crop: NetworkSide | None = None
    """Then the square of this side in the middle is taken; none is the network's own."""
    interpolation: Interpolation | None = None
    """How images are resized; none is what the network was trained with."""
    antialias: bool = True
    """Whether resizing to a smaller side averages over neighbouring pixels."""
    mean: Channels | None = None
    """Subtracted from red, green and blue in [0, 1]; none is what the network was trained with."""
    std: Channels | None = None
    """Red, green and blue are then divided by it; none is what the network was trained with."""

    def resolved(self) -> Self:
        keys = Preprocessing._fields
        if None not in (getattr(self, key) for key in keys):
            return self
        own = _find(self.net).preprocessing(self.checkpoint)._asdict()
        return self.model_copy(update={key: own[key] for key in keys if getattr(self, key) is None})


class ImageNetwork:
    """A frozen network with its pre-processing: images [n, 3, H, W] in about [-1, 1] -> [n, D] fp32.

    Args:
        output: its logits, or the features that its last layer decides on.

    Raises:
        UserError: an unknown network, or weights that are not its own.
    """

    def __init__(self, settings: NetworkTable, context: RewardContext, *, output: Output) -> None:
        library = _find(settings.net)
        own = library.preprocessing(settings.checkpoint)
        given = {key: getattr(settings, key) for key in own._fields if getattr(settings, key) is not None}
        self._how, self._antialias = own._replace(**given), settings.antialias
        built = library.build(settings.checkpoint, output)
        self.num_classes, self.class_names = built.num_classes, built.class_names
        self.network = context.prepare(built.network.eval())
        self._dtype = context.dtype
        self._mean, self._std = (
            torch.tensor(values, device=context.device).view(3, 1, 1) for values in (self._how.mean, self._how.std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        outputs = self.network(self.preprocess(images).to(self._dtype))
        return outputs.float()

    def preprocess(self, images: Tensor) -> Tensor:
        """-> [n, 3, h, w] fp32 as the network wants them."""
        images, (resize, crop, interpolation, _, _) = (images.float().clamp(-1, 1) + 1) / 2, self._how
        if resize is not None and images.shape[-2:] != (resize, resize):
            shorter = min(images.shape[-2:])
            size = [round(side * resize / shorter) for side in images.shape[-2:]]
            if interpolation == "bicubic" and self._antialias:
                images = resize_as_pillow(to_uint8(images * 2 - 1).float(), *size) / 255
            else:
                images = F.interpolate(images, size=size, mode=interpolation, antialias=self._antialias)
        if crop is not None:
            top, left = (round((side - crop) / 2) for side in images.shape[-2:])
            images = F.pad(images, (max(-left, 0),) * 2 + (max(-top, 0),) * 2)
            top, left = max(top, 0), max(left, 0)
            images = images[..., top : top + crop, left : left + crop]
        return (images - self._mean) / self._std


class _Built(NamedTuple):
    network: nn.Module
    num_classes: int
    class_names: Sequence[str] = ()  # where they are written with the weights


class _Library(NamedTuple):
    """What is known of a network before it is built."""

    preprocessing: Callable[[str], Preprocessing]  # of the weights in a file of that name
    build: Callable[[str, Output], _Built]  # from weights


def _find(net: str) -> _Library:
    library, _, name = net.partition(":")
    if net == OWN:
        neutral = Preprocessing(None, None, "bilinear", [0.5] * 3, [0.5] * 3)  # images of any size, in [-1, 1]
        return _Library(lambda checkpoint: neutral, _own)
    if library == "torchvision" and name:
        return _torchvision(name)
    if library == "timm" and name:
        return _timm(name)
    raise UserError(f"net: must be {OWN}, torchvision:NAME or timm:NAME, not {net}")


def _own(checkpoint: str, output: Output) -> _Built:
    classifier = load_classifier(checkpoint)
    network = _Look(classifier, lambda network, images: network.features(images))
    config = classifier.config
    return _Built(network if output == "features" else classifier, config.num_classes, config.class_names or ())


def _torchvision(name: str) -> _Library:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UserError(f"net: torchvision has no classification network {name}")

    def preprocessing(checkpoint: str) -> Preprocessing:
        published = models.get_model_weights(name)
        of_file = [weights for weights in published if Path(weights.url).name == Path(checkpoint).name]
        own = (of_file or [published.DEFAULT])[0].transforms()
        return Preprocessing(own.resize_size[0], own.crop_size[0], own.interpolation.value, own.mean, own.std)

    def build(checkpoint: str, output: Output) -> _Built:
        keys: dict[str, Any] = {}
        if name in TRANSFORMS_INPUT:
            keys = {"transform_input": True, "aux_logits": True, "init_weights": False}
        network = models.get_model(name, weights=None, **keys)
        _load(network, checkpoint, what=f"the weights of torchvision's {name}")
        linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(f"net: torchvision's {name} does not end in a linear layer; take another network")
        num_classes = network.get_submodule(linear[-1]).out_features
        if output == "features":
            network.set_submodule(linear[-1], nn.Identity())
        return _Built(network, num_classes)

    return _Library(preprocessing, build)


def _timm(name: str) -> _Library:
    timm = import_extra("timm", extra="rewards", wanted_by=f"net: timm:{name}")
    if not timm.is_model(name):
        raise UserError(f"net: timm has no network {name}")

    def preprocessing(checkpoint: str) -> Preprocessing:
        published = timm.get_pretrained_cfg(name)
        config = timm.data.resolve_data_config(pretrained_cfg=published.to_dict() if published else {})
        crop = config["input_size"][-1]
        interpolation: Interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        resize = math.floor(crop / config["crop_pct"])
        return Preprocessing(resize, crop, interpolation, list(config["mean"]), list(config["std"]))

    def build(checkpoint: str, output: Output) -> _Built:
        network = timm.create_model(name, pretrained=False)
        _load(network, checkpoint, what=f"the weights of timm's {name}")
        if output == "logits":
            return _Built(network, network.num_classes)
        return _Built(_Look(network, _timm_features), network.num_classes)

    return _Library(preprocessing, build)


def _load(network: nn.Module, checkpoint: str, *, what: str) -> None:
    weights = read_published(checkpoint)
    if weights.keys() >= {"layers.0.conv1.weight", "head.weight"}:  # as in `load_classifier`
        raise UserError(f'{checkpoint} holds a classifier of `grpo classifier`, not {what}: set net = "{OWN}"')
    load_strictly(network, weights, checkpoint, what=what)


def _timm_features(network: Any, images: Tensor) -> Tensor:
    return network.forward_head(network.forward_features(images), pre_logits=True)


class _Look(nn.Module):
    """A network with another forward; `look` holds no network of its own, so that a copy looks through its copy."""

    def __init__(self, network: nn.Module, look: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.look = network, look

    def forward(self, images: Tensor) -> Tensor:
        return self.look(self.network, images)
