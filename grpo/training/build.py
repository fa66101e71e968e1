"""Models of a recipe, ready on their devices."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from grpo.config import GRPORecipe, PretrainRecipe, UserError
from grpo.config import Tokenizer as TokenizerConfig
from grpo.models import GPT, GPTConfig, VQModel, get_model_spec, get_tokenizer_spec, load_gpt, load_vq
from grpo.parallel import World, load_full_state_dict, parallelize


def gpt_config(recipe: GRPORecipe | PretrainRecipe) -> GPTConfig:
    """Sizes of the recipe's GPT: the spec, for its images and codes."""
    return get_model_spec(recipe.model.name).config(
        image_size=recipe.data.image_size,
        downsample_size=recipe.tokenizer.downsample_size,
        vocab_size=recipe.tokenizer.codebook_size,
        num_classes=recipe.model.num_classes,
        cls_token_num=recipe.model.cls_token_num,
        class_dropout=recipe.model.class_dropout,
        dropout=recipe.model.dropout,
    )


def build_gpt(
    recipe: GRPORecipe | PretrainRecipe, *, checkpoint: str | None, mesh: DeviceMesh, world: World
) -> nn.Module:
    """The GPT, parallelized, with weights from a checkpoint or, seeded, at random.

    Rank 0 alone holds the whole model, on its CPU; the others get their shards by broadcast.
    """
    config = gpt_config(recipe)
    bare = recipe.model.from_fsdp and checkpoint == recipe.model.checkpoint
    weights: Mapping[str, Tensor] | None = None
    if world.is_main:
        if checkpoint is not None:
            weights = load_gpt(checkpoint, config, bare=bare).state_dict()
        else:
            torch.manual_seed(recipe.training.seed)
            weights = GPT(config).state_dict()
    with torch.device("meta"):
        model = GPT(config)
    parallelize(
        model,
        mesh=mesh,
        parallel=recipe.parallel,
        compile=recipe.compile,
        activation_checkpoint=recipe.activation_checkpoint,
        training=recipe.training,
    )
    load_full_state_dict(model, weights, device=world.device)
    return model


def build_tokenizer(config: TokenizerConfig, *, device: torch.device, seed: int = 0) -> VQModel:
    """The frozen tokenizer of a recipe, whole on every rank; random weights when it names no checkpoint."""
    spec = get_tokenizer_spec(config.name)
    sizes = spec.config(codebook_size=config.codebook_size, codebook_embed_dim=config.codebook_embed_dim)
    if sizes.downsample_size != config.downsample_size:
        raise UserError(
            f"tokenizer.downsample_size: {config.name} has {sizes.downsample_size} pixels a code, not "
            f"{config.downsample_size}; set it to {sizes.downsample_size} or choose another tokenizer.name"
        )
    if config.checkpoint is None:
        torch.manual_seed(seed)
        model = VQModel(sizes)
    else:
        model = load_vq(config.checkpoint, sizes)
    return model.to(device).eval().requires_grad_(False)
