"""The tokenizer of a recipe."""

import torch

from grpo.config import Tokenizer, UserError
from grpo.models.specs import get_tokenizer_spec
from grpo.models.vq import VQConfig, VQModel
from grpo.models.weights import load_vq


def tokenizer_sizes(section: Tokenizer) -> VQConfig:
    """Sizes of the recipe's tokenizer.

    Raises:
        UserError: no such spec, or one whose codes have another size.
    """
    sizes = get_tokenizer_spec(section.name).config(
        codebook_size=section.codebook_size, codebook_embed_dim=section.codebook_embed_dim
    )
    if sizes.downsample_size != section.downsample_size:
        raise UserError(
            f"tokenizer.downsample_size: {section.name} has {sizes.downsample_size} pixels a code, not "
            f"{section.downsample_size}; set it to {sizes.downsample_size} or choose another tokenizer.name"
        )
    return sizes


def build_tokenizer(section: Tokenizer, *, device: torch.device, seed: int = 0) -> VQModel:
    """The frozen tokenizer of a recipe, whole on every rank; random weights when it names no checkpoint."""
    sizes = tokenizer_sizes(section)
    if section.checkpoint is None:
        torch.manual_seed(seed)
        model = VQModel(sizes)
    else:
        model = load_vq(section.checkpoint, sizes)
    return model.to(device).eval().requires_grad_(False)
