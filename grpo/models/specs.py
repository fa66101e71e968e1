"""LlamaGen's named sizes of GPTs and tokenizers, the quickstart's, and small ones for tests and debugging."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

from grpo.config import Tokenizer, UserError
from grpo.models.gpt import GPTConfig
from grpo.models.vq import VQConfig


class ModelSpec(SimpleNamespace):
    """Sizes of a GPT that do not depend on the images, the codes and the classes, by their names in `GPTConfig`."""

    def config(self, *, image_size: int = 256, downsample_size: int = 16, **others: Any) -> GPTConfig:
        """The whole configuration for square images of `image_size` pixels and codes of `downsample_size` pixels.

        `others` are the rest of `GPTConfig`. Raises a UserError if the image is not a whole number of codes wide.
        """
        side, rest = divmod(image_size, downsample_size)
        if rest or not side:
            raise UserError(
                f"data.image_size: {image_size} pixels are not a multiple of tokenizer.downsample_size "
                f"{downsample_size}; take {max(side, 1) * downsample_size}"
            )
        return GPTConfig(**vars(self), block_size=side**2, **others)


class TokenizerSpec(SimpleNamespace):
    """Sizes of a tokenizer that do not depend on the codebook, by their names in `VQConfig`."""

    def config(self, **others: Any) -> VQConfig:
        """The whole configuration; `others` are the rest of `VQConfig`, such as `codebook_size`."""
        return VQConfig(**vars(self), **others)


GPT_SPECS: Mapping[str, ModelSpec] = {
    "GPT-B": ModelSpec(dim=768, n_layer=12, n_head=12),
    "GPT-L": ModelSpec(dim=1024, n_layer=24, n_head=16),
    "GPT-XL": ModelSpec(dim=1280, n_layer=36, n_head=20),
    "GPT-XXL": ModelSpec(dim=1536, n_layer=48, n_head=24),
    "GPT-XXXL": ModelSpec(dim=2560, n_layer=48, n_head=40),
    "GPT-1B": ModelSpec(dim=2048, n_layer=22, n_head=32),
    "GPT-3B": ModelSpec(dim=3200, n_layer=24, n_head=32),
    "GPT-7B": ModelSpec(dim=4096, n_layer=32, n_head=32),
    "GPT-digits": ModelSpec(dim=128, n_layer=4, n_head=4, multiple_of=128, rope_base=100),
    "GPT-tiny": ModelSpec(dim=64, n_layer=2, n_head=4),
}

TOKENIZER_SPECS: Mapping[str, TokenizerSpec] = {
    "VQ-16": TokenizerSpec(ch_mult=(1, 1, 2, 2, 4)),
    "VQ-8": TokenizerSpec(ch_mult=(1, 2, 2, 4)),
    "VQ-digits": TokenizerSpec(ch=16, ch_mult=(1, 2), z_channels=16, num_res_blocks=1, norm_groups=4, patch_size=2),
    "VQ-shapes": TokenizerSpec(
        ch=32, ch_mult=(1,), z_channels=32, num_res_blocks=1, norm_groups=4, patch_size=4, patch_encoder=True
    ),
    "VQ-tiny": TokenizerSpec(ch=16, ch_mult=(1, 1), z_channels=16, num_res_blocks=1, norm_groups=4, patch_size=2),
}


def get_tokenizer_spec(name: str) -> TokenizerSpec:
    """The tokenizer spec of that name. Raises a UserError, with the nearest name, if there is none."""
    return named_spec(TOKENIZER_SPECS, name, key="tokenizer.name")


def tokenizer_sizes(section: Tokenizer) -> VQConfig:
    """Sizes of a recipe's tokenizer. Raises a UserError if there is no such spec, or its codes have another size."""
    sizes = get_tokenizer_spec(section.name).config(
        codebook_size=section.codebook_size, codebook_embed_dim=section.codebook_embed_dim
    )
    if sizes.downsample_size != section.downsample_size:
        raise UserError(
            f"tokenizer.downsample_size: {section.name} has {sizes.downsample_size} pixels a code, not "
            f"{section.downsample_size}; set it to {sizes.downsample_size} or choose another tokenizer.name"
        )
    return sizes


def named_spec(specs: Mapping[str, Any], name: str, *, key: str) -> Any:
    """The spec of that name, the value of `key`. Raises a UserError, with the nearest name, if there is none."""
    if name in specs:
        return specs[name]
    by_lower_case = {known.lower(): known for known in specs}
    near = get_close_matches(name.lower(), by_lower_case, n=1)
    hint = f"did you mean {by_lower_case[near[0]]}? " if near else ""
    raise UserError(f"{key}: there is no {name!r}; {hint}known are {', '.join(specs)}")
