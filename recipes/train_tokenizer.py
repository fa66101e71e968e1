"""Training of a VQ tokenizer: images -> codes -> images.

python recipes/train_tokenizer.py --config train_configs/quickstart/tokenizer.toml
torchrun --nproc_per_node=8 recipes/train_tokenizer.py --config train_configs/quickstart/tokenizer.toml
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # recipes/grpo.py would be imported in place of the package grpo
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor
from torch.nn import functional as F

from grpo.config import TokenizerRecipe, load_recipe
from grpo.data import ImageBatch, build_dataset, build_stream
from grpo.observe import SampleRow
from grpo.parallel import World, build_mesh, distributed, grad_scaler, gradient_sync, run_main, set_matmul_precision
from grpo.training import Codebook, MetricSums, OptimizerStep, TrainingRun, autocast, build_trainable_tokenizer


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(TokenizerRecipe, arguments)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: TokenizerRecipe, world: World) -> None:
    """The whole job on this rank."""
    training, config = recipe.training, recipe.tokenizer_loss
    set_matmul_precision(training.mixed_precision)
    mesh = build_mesh(recipe.parallel, world)
    dataset = build_dataset(recipe.data, num_classes=None)
    stream = build_stream(
        dataset,
        batch_size=training.batch_size * training.gradient_accumulation_steps,
        seed=training.seed,
        num_workers=recipe.data.num_workers,
        rank=world.rank,
        world_size=world.size,
    )
    tokenizer = build_trainable_tokenizer(recipe, mesh=mesh, world=world).train()
    step = OptimizerStep(
        tokenizer,
        recipe.optimizer,
        total_steps=training.steps,
        max_skipped_steps=training.max_skipped_steps,
        scaler=grad_scaler(training.mixed_precision, world.device),
    )
    codebook = Codebook(tokenizer.quantize, config, step)
    distance = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
    metrics = MetricSums()

    with TrainingRun(recipe, world, title="Tokenizer") as run:
        run.start(model=tokenizer, step=step, stream=stream)
        for number in run.steps():
            with run.timer("data"):
                images = next(stream).to(world.device)  # [B]
            parts = images.parts(training.batch_size)
            for index, batch in enumerate(parts):
                gradient_sync(tokenizer, index == len(parts) - 1)
                with run.timer("forward"), autocast(training, world.device):
                    reconstruction, vq_loss, commit_loss, _ = tokenizer(batch.images)
                error = distance(reconstruction.float(), batch.images)
                loss = error + commit_loss + (vq_loss if config.codebook_update == "gradient" else 0.0)
                with run.timer("backward"):
                    step.backward(loss / len(parts))
                for name, value in {"loss": loss, "reconstruction": error, "commitment": commit_loss}.items():
                    metrics.add(name, value)
            for name, value in (step() | codebook.update()).items():
                metrics.add(name, value)
            metrics.add("codebook_usage", tokenizer.quantize.usage())
            if run.observer.wants_images(number):
                rows = sample_rows(batch, reconstruction, dataset.class_names)
                run.observer.images(number, rows[: recipe.metrics.image_groups])
            run.finish(number, metrics.means(), images=len(images.class_ids) * world.size)


def sample_rows(batch: ImageBatch, reconstruction: Tensor, class_names: Sequence[str]) -> list[SampleRow]:
    """Rows of the image grid: the image, its reconstruction and minus the squared error."""
    rewards = -(reconstruction.detach().float() - batch.images).square().mean(dim=(1, 2, 3))
    return [
        SampleRow(image, completion[None], reward[None], class_names[int(class_id)])
        for image, completion, reward, class_id in zip(
            batch.images, reconstruction.detach().float(), rewards, batch.class_ids, strict=True
        )
    ]


if __name__ == "__main__":
    run_main(main)
