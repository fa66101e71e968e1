"""The precision of the rewards' networks, and how much of the tokenizer's work fits into memory."""

from typing import Literal

import torch

from grpo.models import VQConfig
from grpo.parallel import free_memory

MEMORY_SHARE = 0.5  # of the free memory, for the decoder's activations
FEATURE_MAPS = 6  # of full resolution that a decoder holds at once, with those that a convolution works in
MAX_ELEMENTS = 2**31 - 1  # of one tensor; beyond, convolutions leave their fast 32-bit indexing


def reward_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """The dtype of the rewards' networks; auto is bf16 on a GPU and fp32 elsewhere."""
    low = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if low else torch.float32


def decode_batch(config: VQConfig, num_codes: int, *, dtype: torch.dtype, device: torch.device) -> int:
    """Completions of T = `num_codes` that a tokenizer can decode at once in the memory now free; 64 on a CPU."""
    if device.type != "cuda":
        return 64
    in_memory = int(free_memory(device) * MEMORY_SHARE) // bytes_per_image(config, num_codes, dtype=dtype)
    return max(1, min(in_memory, MAX_ELEMENTS // _largest_map(config, num_codes)))


def bytes_per_image(config: VQConfig, num_codes: int, *, dtype: torch.dtype) -> int:
    """Memory that a tokenizer needs for the activations of one image, without gradients."""
    return _largest_map(config, num_codes) * FEATURE_MAPS * dtype.itemsize


def _largest_map(config: VQConfig, num_codes: int) -> int:
    """Elements of the largest feature map of one image."""
    return num_codes * (config.downsample_size // config.patch_size) ** 2 * config.ch * config.ch_mult[0]
