"""Training of a network that reads drawings of shapes, to judge a run's images or to reward them.

grpo reader --config quickstart_text/reader
torchrun --nproc_per_node=8 -m grpo reader --config quickstart_text/reader
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("reader")

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo.config import ReaderRecipe, load_recipe
from grpo.data import ImageBatch, build_dataset
from grpo.parallel import World, distributed
from grpo.shapes import reading_loss
from grpo.training import TrainingRun, autocast, build_optimizer, build_reader, minimise


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(ReaderRecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: ReaderRecipe, world: World) -> None:
    """The whole job on this rank."""
    with TrainingRun(recipe, world, title="Reader") as run:
        dataset = build_dataset(recipe.data, num_classes=None)
        reader = build_reader(recipe, mesh=run.mesh, world=world).train()

        def loss(batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
            images = spoiled(batch.images, noise=recipe.reader.noise)
            with run.timer("forward"), autocast(recipe.training, world.device):
                outputs = reader(images)
            return reading_loss(outputs.float(), dataset.scenes(batch.indices.tolist()).to(world.device))

        minimise(run, reader, dataset, loss, optimizer=build_optimizer(reader, recipe, world))


def spoiled(images: Tensor, *, noise: float) -> Tensor:
    """Images [B, 3, H, W] as a generator might draw them: each with blur and with noise of its own strength."""
    line = torch.tensor([1.0, 2.0, 1.0], device=images.device) / 4
    kernel = (line[:, None] * line).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    blur, strength = torch.rand(2, len(images), 1, 1, 1, device=images.device)
    return torch.lerp(images, blurred, blur) + noise * strength * torch.randn_like(images)
