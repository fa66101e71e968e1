"""Training of a VQ tokenizer: images -> codes -> images.

grpo tokenizer --config quickstart/tokenizer
torchrun --nproc_per_node=8 -m grpo tokenizer --config quickstart/tokenizer
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("tokenizer")

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from grpo.config import TokenizerRecipe, load_recipe
from grpo.data import ImageBatch, build_dataset
from grpo.models import load_lpips
from grpo.observe import SampleRow
from grpo.parallel import World, distributed
from grpo.training import (
    Adversary,
    Codebook,
    TrainingRun,
    autocast,
    build_optimizer,
    build_trainable_tokenizer,
    minimise,
)


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(TokenizerRecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: TokenizerRecipe, world: World) -> None:
    """The whole job on this rank."""
    config = recipe.tokenizer_loss
    distance = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
    with TrainingRun(recipe, world, title="Tokenizer") as run:
        lpips = None
        if config.perceptual_weight:
            lpips = load_lpips(config.perceptual_backbone, key="tokenizer_loss.perceptual_backbone").to(world.device)
        dataset = build_dataset(recipe.data, num_classes=None)
        tokenizer = build_trainable_tokenizer(recipe, mesh=run.mesh, world=world).train()
        optimizer = build_optimizer(tokenizer, recipe, world)
        codebook = Codebook(tokenizer.quantize, config, optimizer)
        adversary = Adversary(recipe, tokenizer, optimizer, world=world) if recipe.adversary.weight else None
        newest: list[ImageBatch | Tensor] = []  # micro-batch and its reconstruction

        def loss(batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
            metrics = {}
            with run.timer("forward"), autocast(recipe.training, world.device):
                reconstruction, vq_loss, commit_loss, _ = tokenizer(batch.images)
                reconstruction = reconstruction.float().view_as(batch.images)  # which nobody watches for the backward
                newest[:] = batch, reconstruction.detach()
                metrics["reconstruction"] = likeness = distance(reconstruction, batch.images)
                if lpips:
                    metrics["perceptual"] = lpips(reconstruction, batch.images).mean()
                    likeness = likeness + config.perceptual_weight * metrics["perceptual"]
            adversarial = adversary.loss(likeness, reconstruction, batch.images) if adversary else 0.0
            codes = commit_loss + (vq_loss if config.codebook_update == "gradient" else 0.0)
            return likeness + adversarial + codes, {**metrics, "commitment": commit_loss}

        def after_step(step: int) -> dict[str, float]:
            if run.observer.wants_images(step):
                run.observer.images(step, sample_rows(*newest)[: recipe.metrics.image_groups])
            judged = adversary.update() if adversary else {}
            return {**codebook.update(), "codebook_usage": tokenizer.quantize.usage(), **judged}

        extra = {"adversary": adversary} if adversary else None
        minimise(run, tokenizer, dataset, loss, optimizer=optimizer, extra=extra, after_step=after_step)
    if adversary and recipe.checkpoint.save_final:
        adversary.save(recipe.run_dir)


def sample_rows(batch: ImageBatch, reconstruction: Tensor) -> list[SampleRow]:
    """Rows of the image grid: the image, its reconstruction and minus the squared error."""
    rewards = -(reconstruction - batch.images).square().mean(dim=(1, 2, 3))
    rows = zip(batch.images, reconstruction[:, None], rewards[:, None], batch.captions, strict=True)
    return [SampleRow(*row) for row in rows]
