"""Families of generators: all that the rest of the project knows about a model.

A new family is its model and a class like `LlamaGen`, in a file of their own, and an entry in `FAMILIES`.
"""

import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor, nn

import grpo.models.costs as gpt_costs
from grpo.config import Model, Tokenizer, UserError
from grpo.formats import merged, read_adapter
from grpo.models.cached_forward import CachedForward
from grpo.models.fused_gpt import cached_forward
from grpo.models.generator import Generator
from grpo.models.gpt import GPT, GPTConfig
from grpo.models.specs import GPT_SPECS, named_spec
from grpo.models.weights import load_gpt


class ModelFamily(Protocol):
    """How the models of a family are made; what a model is, see `Generator`."""

    specs: Mapping[str, Any]
    """Its named sizes; a name belongs to one family."""
    costs: ModuleType
    """Floating-point operations and bytes by `config`, as in `grpo.models.costs`."""
    model: type[Generator]
    """The class of its models."""

    def sizes(
        self, model: Model, tokenizer: Tokenizer, *, image_size: int, class_names: Sequence[str] | None = None
    ) -> Any:
        """The `config` of the spec `model.name` for a recipe's sections. Raises a UserError if they do not fit.

        `class_names`, a name a class, go with the weights in files that have a place for them.
        """

    def build(self, config: Any) -> Generator:
        """A model with fresh weights."""

    def load(
        self, path: str | os.PathLike[str], config: Any = None, *, bare: bool = False, new_classes: int = 0
    ) -> Generator:
        """A model with the weights at `path`, in any layout in which the family is published; see `load_gpt`."""

    def export(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the names under which the family is published."""

    def cached_forward(self, model: Any, *, impl: str, copies: bool) -> CachedForward:
        """What samples from a model: `CachedForward(model)`, or the same in fused kernels where the family has them.

        Its parameters are whole. With `copies` the weights may be copied, see `FusedGPT`.
        """


class LlamaGen:
    """LlamaGen's GPTs over the codes of a VQ tokenizer (https://arxiv.org/abs/2406.06525)."""

    specs: Mapping[str, Any] = GPT_SPECS
    costs: ModuleType = gpt_costs
    model: type[Generator] = GPT
    load = staticmethod(load_gpt)
    cached_forward = staticmethod(cached_forward)

    def build(self, config: GPTConfig) -> GPT:
        return GPT(config)

    def export(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state_dict)  # the names are the released ones

    def sizes(
        self, model: Model, tokenizer: Tokenizer, *, image_size: int, class_names: Sequence[str] | None = None
    ) -> GPTConfig:
        return self.specs[model.name].config(
            image_size=image_size,
            downsample_size=tokenizer.downsample_size,
            vocab_size=tokenizer.codebook_size,
            num_classes=model.num_classes,
            class_names=None if class_names is None else tuple(class_names),
            cls_token_num=model.cls_token_num,
            caption_dim=model.caption_dim,
            class_dropout=model.class_dropout,
            dropout=model.dropout,
            token_dropout=model.token_dropout,
        )


FAMILIES: tuple[ModelFamily, ...] = (LlamaGen(),)

MODEL_SPECS: Mapping[str, Any] = {name: spec for family in FAMILIES for name, spec in family.specs.items()}


def get_family(spec_name: str) -> ModelFamily:
    """The family that the spec belongs to. Raises a UserError, with the nearest name, if there is none."""
    return named_spec({name: family for family in FAMILIES for name in family.specs}, spec_name, key="model.name")


def family_named(architecture: str) -> ModelFamily:
    """The family whose models are of the class of that name. Raises a UserError if there is none."""
    known = {family.model.__name__: family for family in FAMILIES}
    if architecture not in known:
        raise UserError(f"there is no generator of the architecture {architecture}; known are {', '.join(known)}")
    return known[architecture]


def family_of(model: nn.Module) -> ModelFamily:
    """The family of a model, parallelized or not."""
    return next(family for family in FAMILIES if isinstance(model, family.model))


def load_generator(section: Model, sizes: Any, *, checkpoint: str | None = None, new_classes: int = 0) -> Generator:
    """The weights of `model.checkpoint`, or of another `checkpoint`, in a model of these sizes, see `load_gpt`.

    `model.adapter` belongs to the first, and is merged into it.
    """
    family, own = get_family(section.name), checkpoint in (None, section.checkpoint)
    path = section.checkpoint if own else checkpoint
    assert path is not None, "a recipe without model.checkpoint builds its generator"
    model = family.load(path, sizes, bare=section.from_fsdp and own, new_classes=new_classes)
    if section.adapter is not None and own:
        model.load_state_dict(merged(model.state_dict(), *read_adapter(section.adapter)))
    return model


def generator_sizes(
    model: Model, tokenizer: Tokenizer, *, image_size: int, class_names: Sequence[str] | None = None
) -> Any:
    """Sizes of a recipe's generator. Raises a UserError: no such spec, or images that are not whole codes wide."""
    return get_family(model.name).sizes(model, tokenizer, image_size=image_size, class_names=class_names)
