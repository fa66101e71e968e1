"""The GPT over image codes, the VQ tokenizer, their named sizes, and their weights in and out."""

from grpo.models.gpt import GPT, GPTConfig, KVCache
from grpo.models.vq import VQConfig, VQModel

__all__ = ["GPT", "GPTConfig", "KVCache", "VQConfig", "VQModel"]
