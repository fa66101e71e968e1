"""LlamaGen's family: GPTs over the codes of a VQ tokenizer (https://arxiv.org/abs/2406.06525)."""

import grpo.models.costs as costs
from grpo.config import Model, Tokenizer
from grpo.models.gpt import GPT, GPTConfig
from grpo.models.specs import GPT_SPECS
from grpo.models.weights import load_gpt


class LlamaGen:
    """The family as `grpo.models.family.ModelFamily` asks for it."""

    specs = GPT_SPECS
    costs = costs
    build = GPT
    load = staticmethod(load_gpt)
    export = dict  # the names are the released ones

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
