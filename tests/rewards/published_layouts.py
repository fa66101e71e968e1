"""Small weights in published layouts and images, made by arithmetic: the same numbers wherever they are made."""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from grpo.formats import save_weights


def noise(count: int, seed: int = 0) -> Tensor:
    """[count] int64 in 0 .. 2^32 - 1, without any generator of random numbers."""
    words = (torch.arange(count) * 2654435761 + seed) % (1 << 32)
    words = ((words ^ (words >> 15)) * 2246822519) % (1 << 32)
    return words ^ (words >> 13)


def images(count: int, side: int) -> Tensor:
    """[count, 3, side, side] uint8: noise over waves."""
    waves = torch.arange(3 * side).view(3, side, 1) * 7 + torch.arange(side) * 5
    return ((noise(count * 3 * side * side).view(count, 3, side, side) % 64 + waves) % 256).to(torch.uint8)


def counted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of these names and shapes, fp32: matrices that about halve what goes through, gains near 1."""
    weights = {}
    for name, shape in shapes.items():
        values = noise(math.prod(shape), zlib.crc32(name.encode())).double() / 2**32 - 0.5
        if len(shape) > 1:
            values = values * math.sqrt(3 / math.prod(shape[1:]))
        else:
            values = 0.2 * values + name.endswith("weight")
        weights[name] = values.view(shape).float()
    return weights


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is learned in a state dict."""
    fixed = ("attn_mask", "position_ids", "relative_position_index")
    return {name: tuple(value.shape) for name, value in weights.items() if not name.endswith(fixed)}


def save_open_clip(folder: Path, architecture: str, *, side: int) -> tuple[Path, Path]:
    """Make a small architecture known to open_clip; files of its weights, random: open_clip's own, and HPSv2.1's."""
    import open_clip

    vision = {"image_size": side, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{architecture}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{architecture}.json")
    torch.manual_seed(0)
    weights = open_clip.create_model(architecture, load_weights=False).state_dict()
    save_weights(folder / "open_clip.safetensors", weights)
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, folder / "h.pt")
    return folder / "open_clip.safetensors", folder / "h.pt"
