"""CLIP networks with the pre-processing of images and texts that belongs to them, from weights on this machine.

Two layouts are read: a file of open_clip's state dict, and a folder as transformers' `CLIPModel` is saved. The network
itself is that of the library in question. Texts of either go through open_clip's tokenizer, which ships its vocabulary;
behind the end of a text it has other padding than transformers' tokenizer, which no feature depends on, as attention is
causal and the feature of a text is taken at its end.
"""

import json
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from grpo.config import UserError, import_extra, read_bytes, reason
from grpo.models import to_uint8
from grpo.rewards.base import RewardContext
from grpo.rewards.published_weights import load_strictly, read_published, sizes_of
from grpo.rewards.resizing import resize_as_pillow
from grpo.rewards.words import TextFeatures

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT_LENGTH = 77  # tokens of a text
LEVELS = ((0.0, 0.3, 0.6), (-1.0, 0.5, 1.0, 1.5))

Resize = Literal["crop", "squash"]


def quantised(cosines: Tensor) -> Tensor:
    """AR-GRPO's levels (arXiv 2508.06924): -1 below 0, .5 below .3, 1 below .6, 1.5 from there on.

    Its published code has one more edge at 1, above which it has no level left and fails.
    """
    edges, levels = (torch.tensor(values, device=cosines.device) for values in LEVELS)
    return levels[torch.bucketize(cosines, edges, right=True)].where(~cosines.isnan(), cosines)


def clip_pixels(images: Tensor, size: int, resize: Resize = "crop") -> Tensor:
    """Images [n, 3, H, W] in [-1, 1] as a CLIP network takes them, [n, 3, size, size] fp32.

    - "crop", CLIP's own: the shorter side to `size`, bicubic with antialias as Pillow does it, the middle cut out.
    - "squash": both sides to `size`, bilinear without antialias, never rounded.
    """
    if resize == "squash":
        pixels = images.float().add(1).div(2).clamp(0, 1)
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    else:
        pixels = to_uint8(images).float()
        height, width = (size * side // min(pixels.shape[-2:]) for side in pixels.shape[-2:])
        pixels = TF.center_crop(resize_as_pillow(pixels, height, width), [size, size]) / 255
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


class OpenCLIP(nn.Module):
    """A CLIP of open_clip, by the name of its architecture."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        open_clip = import_extra("open_clip", extra="rewards", wanted_by=f"the CLIP {architecture}")
        config = open_clip.get_model_config(architecture) if architecture in open_clip.list_models() else {}
        parts = [*config.get("vision_cfg", {}), *config.get("text_cfg", {})]
        if "embed_dim" not in config or "custom_text" in config or any(key[:3] in ("hf_", "tim") for key in parts):
            example = "ViT-B-32-quickgelu, ViT-L-14-quickgelu or ViT-H-14"
            raise UserError(f'model: "{architecture}" is no CLIP that open_clip has by itself; take {example}')
        self.model = open_clip.CLIP(**config)
        self.images = self.model.visual
        self.size, self.width = config["vision_cfg"]["image_size"], config["embed_dim"]

    def texts(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


class _TransformersImages(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(self.network(pixel_values=pixels).pooler_output)


class TransformersCLIP(nn.Module):
    """A CLIP of transformers, by the `config.json` in its folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        transformers = import_extra("transformers", extra="rewards", wanted_by=f"the CLIP in {folder}")
        file = folder / "config.json"
        try:
            text = read_bytes(file)
        except (OSError, ValueError) as error:
            why = f"has no config.json ({reason(error)}); give a folder as transformers saves a CLIP"
            raise UserError(f"{folder} {why}") from error
        try:
            config = json.loads(text)
            kind = config["model_type"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file} is not that of a CLIP: no JSON object with a model_type") from error
        if kind != "clip":
            raise UserError(f"{file} is not that of a CLIP: it is of a {kind}")
        with sizes_of(file, what="a CLIP"):
            self.model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config))
        self.images = _TransformersImages(self.model)
        self.size, self.width = self.model.config.vision_config.image_size, self.model.config.projection_dim

    def texts(self, tokens: Tensor) -> Tensor:
        return self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)


def load_clip(checkpoint: str, architecture: str) -> OpenCLIP | TransformersCLIP:
    """The network whose weights are at `checkpoint`: a folder of transformers', else a file of open_clip's.

    Raises a UserError: no such file, not weights of this architecture, a library missing.
    """
    path = Path(checkpoint)
    network: OpenCLIP | TransformersCLIP
    if path.is_dir():
        network, path = TransformersCLIP(path), weights_in(path)
    else:
        network = OpenCLIP(architecture)
    load_strictly(network.model, read_published(path), path, what=f"a CLIP {architecture}")
    return network.eval()


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder of transformers'."""
    names = ("model.safetensors", "pytorch_model.bin")
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has neither {names[0]} nor {names[1]}; give a folder with one of them")
    return found[0]


@cache
def tokenizer() -> Callable[[list[str]], Tensor]:
    """k texts -> [k, 77] int64."""
    open_clip = import_extra("open_clip", extra="rewards", wanted_by="CLIP's tokenizer")
    return open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)


class CLIPScorer:
    """Features of images and texts in a CLIP network, each of length 1, in fp32."""

    def __init__(self, context: RewardContext, checkpoint: str, architecture: str, *, resize: Resize = "crop") -> None:
        network = load_clip(checkpoint, architecture)
        self.scale = network.model.logit_scale.exp().item()
        self.context, self.resize, self.network = context, resize, context.prepare(network)
        self.texts = TextFeatures(self._encode_texts)
        self._last: tuple[Callable[[], Tensor | None], Tensor] | None = None  # a batch, weakly, and its features

    @classmethod
    def of(cls, context: RewardContext, checkpoint: str, architecture: str, *, resize: Resize = "crop") -> "CLIPScorer":
        """The one scorer of these weights in a run: rewards that use the same network see each image once."""
        key = cls, checkpoint, architecture, resize
        if key not in context.shared:
            context.shared[key] = cls(context, checkpoint, architecture, resize=resize)
        return context.shared[key]

    def images(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [-1, 1] -> [n, D]."""
        if self._last is None or self._last[0]() is not images:
            pixels = clip_pixels(images, self.network.size, self.resize).to(self.context.dtype)
            features = F.normalize(self.network.images(pixels).float(), dim=-1)
            self._last = weakref.ref(images), features
        return self._last[1]

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = tokenizer()(list(texts)).to(self.context.device)
        return F.normalize(self.network.texts(tokens).float(), dim=-1)

    def cosines(self, images: Tensor, texts: Sequence[str], text_of: Tensor) -> Tensor:
        """Of n images and those of b texts that `text_of` [n] names: [n]."""
        return (self.images(images) * self.texts(texts)[text_of]).sum(dim=-1)
