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
from grpo.observe import SampleRow
from grpo.parallel import World, distributed
from grpo.training import Codebook, TrainingRun, autocast, build_optimizer, build_trainable_tokenizer, minimise


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
        dataset = build_dataset(recipe.data, num_classes=None)
        tokenizer = build_trainable_tokenizer(recipe, mesh=run.mesh, world=world).train()
        optimizer = build_optimizer(tokenizer, recipe, world)
        codebook = Codebook(tokenizer.quantize, config, optimizer)
        newest: list[ImageBatch | Tensor] = []  # micro-batch and its reconstruction

        def loss(batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
            with run.timer("forward"), autocast(recipe.training, world.device):
                reconstruction, vq_loss, commit_loss, _ = tokenizer(batch.images)
            error = distance(reconstruction.float(), batch.images)
            newest[:] = batch, reconstruction.detach().float()
            value = error + commit_loss + (vq_loss if config.codebook_update == "gradient" else 0.0)
            return value, {"reconstruction": error, "commitment": commit_loss}

        def after_step(step: int) -> dict[str, float]:
            if run.observer.wants_images(step):
                run.observer.images(step, sample_rows(*newest)[: recipe.metrics.image_groups])
            return {**codebook.update(), "codebook_usage": tokenizer.quantize.usage()}

        minimise(run, tokenizer, dataset, loss, optimizer=optimizer, after_step=after_step)


def sample_rows(batch: ImageBatch, reconstruction: Tensor) -> list[SampleRow]:
    """Rows of the image grid: the image, its reconstruction and minus the squared error."""
    rewards = -(reconstruction - batch.images).square().mean(dim=(1, 2, 3))
    rows = zip(batch.images, reconstruction[:, None], rewards[:, None], batch.captions, strict=True)
    return [SampleRow(*row) for row in rows]
