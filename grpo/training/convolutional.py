"""Convolutional networks in training: the tokenizer and the classifier.

Their parameters stay fp32 and autocast lowers what can be lowered, because group statistics and the comparison with the
codebook cannot. (The GPT, which does that by itself, has its parameters cast once a step by FSDP2.)
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from grpo.config import ActivationCheckpoint, ClassifierRecipe, Compile, TokenizerRecipe, Training, UserError
from grpo.models import Classifier, ClassifierConfig, VQModel, get_tokenizer_spec, load_vq
from grpo.parallel import World, compute_dtype, load_full_state_dict, parallelize

Network = TypeVar("Network", bound=nn.Module)


def build_trainable_tokenizer(recipe: TokenizerRecipe, *, mesh: DeviceMesh, world: World) -> VQModel:
    """The recipe's tokenizer, parallelized, with weights from its checkpoint or, seeded, at random.

    The codebook has no gradient where it follows a moving average.
    """
    section, loss = recipe.tokenizer, recipe.tokenizer_loss
    spec = get_tokenizer_spec(section.name)
    config = spec.config(codebook_size=section.codebook_size, codebook_embed_dim=section.codebook_embed_dim)
    if config.downsample_size != section.downsample_size:
        raise UserError(
            f"tokenizer.downsample_size: {section.name} makes one code of {config.downsample_size} pixels, not "
            f"{section.downsample_size}; set it to {config.downsample_size} or choose another tokenizer.name"
        )
    config = replace(config, commit_weight=loss.commitment_weight)

    def initial() -> VQModel:
        return VQModel(config) if section.checkpoint is None else load_vq(section.checkpoint, config)

    def empty() -> VQModel:
        model = VQModel(config)
        model.quantize.requires_grad_(loss.codebook_update == "gradient")
        return model

    return _spread(initial, empty, recipe, compile=recipe.compile, mesh=mesh, world=world)


def build_classifier(recipe: ClassifierRecipe, *, mesh: DeviceMesh, world: World) -> Classifier:
    """The recipe's classifier, parallelized, with seeded random weights."""
    try:
        config = ClassifierConfig(width=recipe.classifier.width, num_classes=recipe.classifier.num_classes)
    except ValueError as error:
        raise UserError(f"classifier.width: {error}") from error

    def make() -> Classifier:
        return Classifier(config)

    return _spread(make, make, recipe, compile=Compile(), mesh=mesh, world=world)


def autocast(training: Training, device: torch.device) -> torch.autocast:
    """The context of a forward pass in the recipe's precision."""
    dtype = compute_dtype(training.mixed_precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _spread(
    initial: Callable[[], Network],
    empty: Callable[[], Network],
    recipe: TokenizerRecipe | ClassifierRecipe,
    *,
    compile: Compile,
    mesh: DeviceMesh,
    world: World,
) -> Network:
    """Parallelize the network that `empty` makes and give it the weights of the one that rank 0 makes by `initial`."""
    torch.manual_seed(recipe.training.seed)
    weights = initial().state_dict() if world.is_main else None
    with torch.device("meta"):
        model = empty()
    parallelize(
        model,
        mesh=mesh,
        parallel=recipe.parallel,
        compile=compile,
        activation_checkpoint=ActivationCheckpoint(),
        training=recipe.training.model_copy(update={"mixed_precision": "fp32"}),
    )
    load_full_state_dict(model, weights, device=world.device)
    return model
