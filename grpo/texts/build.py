"""The encoder of a recipe's texts."""

from typing import Any

import torch

from grpo.config import Model, Text
from grpo.texts.features import TextEncoder
from grpo.texts.store import FeatureStore
from grpo.texts.t5 import StoreThenT5, T5Encoder
from grpo.texts.words import WordEncoder

DEFAULT_MAX_TOKENS = 120


def build_encoder(
    text: Text, model: Model, *, device: torch.device | None = None, max_tokens: int | None = None
) -> TextEncoder:
    """What gives texts to the recipe's generator.

    Args:
        device: where a T5 may run for texts that have no features on disk; None reads what is on disk only.
        max_tokens: of a text that such a T5 sees; None is as many as for the features on disk, else 120.

    Raises:
        UserError: features on disk that cannot be read or are of another width, no T5 where one is wanted.
    """
    sizes: dict[str, Any] = {"rows": model.cls_token_num, "width": model.caption_dim}
    if text.encoder == "words":
        return WordEncoder(**sizes)
    store = FeatureStore(text.features, **sizes) if text.features is not None else None
    if device is None or text.path is None:
        assert store is not None, "the recipe was checked"
        return store
    precision = "bf16" if device.type == "cuda" else "fp32"
    known = store.about["max_tokens"] if store is not None else DEFAULT_MAX_TOKENS
    encoder = T5Encoder(text.path, max_tokens=max_tokens or known, device=device, precision=precision, **sizes)
    return encoder if store is None else StoreThenT5(store, encoder)
