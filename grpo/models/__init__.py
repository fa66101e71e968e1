"""The GPT over image codes, the VQ tokenizer, their named sizes, and their weights in and out."""

from grpo.models.gpt import GPT, GPTConfig, KVCache
from grpo.models.specs import (
    MODEL_SPECS,
    TOKENIZER_SPECS,
    ModelSpec,
    TokenizerSpec,
    get_model_spec,
    get_tokenizer_spec,
)
from grpo.models.vq import VQConfig, VQModel

__all__ = [
    "MODEL_SPECS",
    "TOKENIZER_SPECS",
    "GPT",
    "GPTConfig",
    "KVCache",
    "ModelSpec",
    "TokenizerSpec",
    "VQConfig",
    "VQModel",
    "get_model_spec",
    "get_tokenizer_spec",
]
