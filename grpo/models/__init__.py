"""Conditions, generators' families, the VQ tokenizer, networks that judge; named sizes; weights in and out."""

from grpo.formats import read_weights, save_weights
from grpo.models.cached_forward import CachedForward
from grpo.models.class_names import WORDNET_ID, default_names, imagenet, imagenet_names, learned_classes, numbered
from grpo.models.classifier import Classifier, ClassifierConfig, load_classifier
from grpo.models.condition import CONDITION_PLACE, ClassCondition, Condition, TextCondition, as_condition
from grpo.models.discriminator import Discriminator, DiscriminatorConfig, load_discriminator
from grpo.models.family import (
    MODEL_SPECS,
    ModelFamily,
    family_named,
    family_of,
    generator_sizes,
    get_family,
    load_generator,
)
from grpo.models.generator import Generator
from grpo.models.gpt import GPT, GPTConfig
from grpo.models.kv_cache import KVCache
from grpo.models.lora import WithoutAdapter, adapter_matrices, add_adapter, load_adapter, mark_trained
from grpo.models.lpips import LPIPS, load_lpips
from grpo.models.specs import TOKENIZER_SPECS, get_tokenizer_spec, tokenizer_sizes
from grpo.models.vq import VQConfig, VQModel, fold_upsampling, normalize, to_uint8
from grpo.models.weights import build_tokenizer, load_gpt, load_vq, weights_sha256
