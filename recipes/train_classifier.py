"""Training of a small classifier, to reward a run or to judge its images.

python recipes/train_classifier.py --config train_configs/quickstart/classifier_reward.toml
torchrun --nproc_per_node=8 recipes/train_classifier.py --config train_configs/quickstart/classifier_reward.toml
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # recipes/grpo.py would be imported in place of the package grpo
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo.config import ClassifierRecipe, load_recipe
from grpo.data import build_dataset, build_stream
from grpo.parallel import World, build_mesh, distributed, grad_scaler, gradient_sync, run_main, set_matmul_precision
from grpo.training import MetricSums, OptimizerStep, TrainingRun, autocast, build_classifier


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(ClassifierRecipe, arguments)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: ClassifierRecipe, world: World) -> None:
    """The whole job on this rank."""
    training = recipe.training
    set_matmul_precision(training.mixed_precision)
    mesh = build_mesh(recipe.parallel, world)
    dataset = build_dataset(recipe.data, num_classes=recipe.classifier.num_classes)
    stream = build_stream(
        dataset,
        batch_size=training.batch_size * training.gradient_accumulation_steps,
        seed=training.seed,
        num_workers=recipe.data.num_workers,
        rank=world.rank,
        world_size=world.size,
    )
    classifier = build_classifier(recipe, mesh=mesh, world=world).train()
    step = OptimizerStep(
        classifier,
        recipe.optimizer,
        total_steps=training.steps,
        max_skipped_steps=training.max_skipped_steps,
        scaler=grad_scaler(training.mixed_precision, world.device),
    )
    metrics = MetricSums()

    with TrainingRun(recipe, world, title="Classifier") as run:
        run.start(model=classifier, step=step, stream=stream)
        for number in run.steps():
            with run.timer("data"):
                images = next(stream).to(world.device)  # [B]
            parts = images.parts(training.batch_size)
            for index, batch in enumerate(parts):
                gradient_sync(classifier, index == len(parts) - 1)
                with run.timer("forward"), autocast(training, world.device):
                    logits = classifier(shifted(batch.images, recipe.classifier.shift)).float()
                loss = F.cross_entropy(logits, batch.class_ids)
                with run.timer("backward"):
                    step.backward(loss / len(parts))
                metrics.add("loss", loss)
                metrics.add("accuracy", (logits.argmax(dim=1) == batch.class_ids).sum(), len(logits))
            for name, value in step().items():
                metrics.add(name, value)
            run.finish(number, metrics.means(), images=len(images.class_ids) * world.size)


def shifted(images: Tensor, limit: int) -> Tensor:
    """Images [B, 3, H, W] moved together by up to `limit` pixels each way; what enters repeats the border."""
    if limit == 0:
        return images
    top, left = torch.randint(2 * limit + 1, (2,)).tolist()
    padded = F.pad(images, (limit,) * 4, mode="replicate")
    return padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]


if __name__ == "__main__":
    run_main(main)
