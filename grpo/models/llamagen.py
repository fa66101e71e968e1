"""LlamaGen's family: GPTs over the codes of a VQ tokenizer (https://arxiv.org/abs/2406.06525)."""

import os
from collections.abc import Mapping

from torch import Tensor

import grpo.models.costs as costs
from grpo.config import Model, Tokenizer
from grpo.models.gpt import GPT, GPTConfig
from grpo.models.specs import GPT_SPECS
from grpo.models.weights import load_gpt


class LlamaGen:
    """The family as `grpo.models.family.ModelFamily` asks for it."""

    name = "llamagen"
    specs = GPT_SPECS
    costs = costs

    def sizes(self, model: Model, tokenizer: Tokenizer, *, image_size: int) -> GPTConfig:
        return self.specs[model.name].config(
            image_size=image_size,
            downsample_size=tokenizer.downsample_size,
            vocab_size=tokenizer.codebook_size,
            num_classes=model.num_classes,
            cls_token_num=model.cls_token_num,
            class_dropout=model.class_dropout,
            dropout=model.dropout,
        )

    def build(self, config: GPTConfig) -> GPT:
        return GPT(config)

    def load(self, path: str | os.PathLike[str], config: GPTConfig | None = None, *, bare: bool = False) -> GPT:
        return load_gpt(path, config, bare=bare)

    def export(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state_dict)  # the names are the released ones
