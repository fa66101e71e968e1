"""The GPT over image codes, the VQ tokenizer, a classifier, their named sizes, and their weights in and out."""

from grpo.models.classifier import Classifier, ClassifierConfig, load_classifier
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
from grpo.models.weight_files import read_weights, save_weights
from grpo.models.weights import infer_gpt_config, infer_vq_config, load_gpt, load_vq

__all__ = [
    "GPT",
    "MODEL_SPECS",
    "TOKENIZER_SPECS",
    "Classifier",
    "ClassifierConfig",
    "GPTConfig",
    "KVCache",
    "ModelSpec",
    "TokenizerSpec",
    "VQConfig",
    "VQModel",
    "get_model_spec",
    "get_tokenizer_spec",
    "infer_gpt_config",
    "infer_vq_config",
    "load_classifier",
    "load_gpt",
    "load_vq",
    "read_weights",
    "save_weights",
]
