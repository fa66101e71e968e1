"""Training on real images so that a generator needs no guidance: CCA (contrast of conditions) or GFT.

grpo finetune --config quickstart/cca
torchrun --nproc_per_node=8 -m grpo finetune --config published/cca_l_384
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("finetune")

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo.config import FinetuneRecipe, load_recipe
from grpo.data import ImageBatch, build_codes
from grpo.kernels import Dropout, linear_token_log_probs
from grpo.models import CONDITION_PLACE, Condition, build_tokenizer
from grpo.objectives import contrastive_alignment, guidance_free_log_probs
from grpo.parallel import World, distributed, next_row
from grpo.training import (
    TrainingRun,
    build_data,
    build_frozen,
    build_generator,
    build_judge,
    build_optimizer,
    minimise,
)


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(FinetuneRecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


class Pairs(NamedTuple):
    """Images, and of each the condition of the next one of the whole step's batch, over all ranks, in a circle."""

    images: ImageBatch
    others: Condition  # B rows

    @property
    def rows(self) -> int:
        return self.images.rows

    def parts(self, size: int) -> list["Pairs"]:
        starts = range(0, self.rows, size)
        others = (self.others.select(slice(start, start + size)) for start in starts)
        return [Pairs(*pair) for pair in zip(self.images.parts(size), others, strict=True)]


Loss = Callable[[Pairs], tuple[Tensor, dict[str, Tensor]]]


def train(recipe: FinetuneRecipe, world: World) -> None:
    """The whole job on this rank."""
    training, finetune = recipe.training, recipe.finetune
    with TrainingRun(recipe, world, title=finetune.loss.upper()) as run:
        dataset = build_data(recipe)
        tokenizer = None
        if recipe.needs_tokenizer or recipe.tokenizer.checkpoint is not None:
            tokenizer = build_tokenizer(recipe.tokenizer, device=world.device, seed=training.seed)
        length = (recipe.data.image_size // recipe.tokenizer.downsample_size) ** 2
        encode = run.timer("encode")(build_codes(dataset, tokenizer, length=length, augmented=True, images=False))
        places = {"class_names": dataset.class_names, "mesh": run.mesh, "world": world}
        model = build_generator(recipe, checkpoint=recipe.model.checkpoint, **places)
        if finetune.loss == "cca":
            start = finetune.reference_checkpoint or recipe.model.checkpoint
            loss = cca(recipe, model, build_frozen(recipe, model, checkpoint=start, **places), encode)
        else:
            loss = gft(recipe, model, encode)

        def pairs(images: ImageBatch) -> Pairs:
            return Pairs(images, images.condition.map(next_row))

        optimizer, judge = build_optimizer(model, recipe, world), build_judge(recipe, model, tokenizer, dataset, world)
        minimise(run, model, dataset, loss, prepare=pairs, optimizer=optimizer, judge=judge)


def cca(recipe: FinetuneRecipe, model: nn.Module, reference: nn.Module, encode: Callable[..., Tensor]) -> Loss:
    """Condition contrastive alignment: images are made likelier under their condition than under another's."""
    training, finetune = recipe.training, recipe.finetune

    def log_probs(network: nn.Module, codes: Tensor, condition: Condition, dropout: Dropout) -> Tensor:
        hidden = network.hidden(codes[:, :-1], condition, dropout).flatten(0, 1)  # [2B*T, D]
        weight, asked = network.output.weight, codes.reshape(-1, 1)
        return linear_token_log_probs(hidden, weight, asked, impl=training.kernels).view(codes.shape).sum(1)

    def loss(pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        images = pairs.images
        codes = encode(images).repeat(2, 1)  # [2B, T]: each image with its condition, then with the other
        condition = images.condition.joined(pairs.others)
        # an image has the same masks under both conditions and in both networks: only conditions and weights differ
        dropout = Dropout(images.sample_ids, seed=training.seed, impl=training.kernels)
        dropped = dropout.rows(model.config.class_dropout, place=CONDITION_PLACE)  # the model's own masks
        same = images.condition.equal_rows(pairs.others) | dropped
        both = dropout.repeat(2)
        with torch.no_grad():
            before = log_probs(reference, codes, condition, both)
        ratios = (log_probs(model, codes, condition, both) - before).chunk(2)  # each [B], of a whole image
        settings = {"beta": finetune.scale, "negative_weight": finetune.negative_weight}
        return contrastive_alignment(*ratios, same_condition=same, **settings)

    return loss


def gft(recipe: FinetuneRecipe, model: nn.Module, encode: Callable[..., Tensor]) -> Loss:
    """Guidance-free training: the likelihood of a mixture of conditional and frozen unconditional logits."""
    training, beta = recipe.training, recipe.finetune.scale

    def loss(pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        images = pairs.images
        codes = encode(images)  # [B, T]
        dropout = Dropout(images.sample_ids, seed=training.seed, impl=training.kernels)
        with torch.no_grad():
            unconditional = model.hidden(codes[:, :-1], images.condition.unconditional(), None)
        conditional = model.hidden(codes[:, :-1], images.condition, dropout)
        hidden = conditional.flatten(0, 1), unconditional.flatten(0, 1)  # each [B*T, D]
        weight, asked = model.output.weight, codes.view(-1, 1)
        mixed = guidance_free_log_probs(*hidden, weight, asked, beta=beta, impl=training.kernels)
        with torch.no_grad():
            alone = linear_token_log_probs(hidden[0], weight, asked, impl=training.kernels)
        return -mixed.mean(), {"conditional_ce": -alone.mean()}

    return loss
