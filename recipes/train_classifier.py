"""Training of a small classifier, to reward a run or to judge its images.

grpo classifier --config quickstart/classifier_reward
torchrun --nproc_per_node=8 -m grpo classifier --config quickstart/classifier_reward
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("classifier")

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo.config import ClassifierRecipe, load_recipe
from grpo.data import ImageBatch, build_dataset
from grpo.parallel import World, distributed
from grpo.training import TrainingRun, autocast, build_classifier, build_optimizer, minimise


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(ClassifierRecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: ClassifierRecipe, world: World) -> None:
    """The whole job on this rank."""
    with TrainingRun(recipe, world, title="Classifier") as run:
        dataset = build_dataset(recipe.data, num_classes=recipe.classifier.num_classes)
        names = dataset.class_names
        classifier = build_classifier(recipe, class_names=names, mesh=run.mesh, world=world).train()

        def loss(batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
            with run.timer("forward"), autocast(recipe.training, world.device):
                logits = classifier(shifted(batch.images, recipe.classifier.shift)).float()
            class_ids = batch.condition.class_ids
            right = logits.argmax(dim=1) == class_ids
            return F.cross_entropy(logits, class_ids), {"accuracy": right.double().mean()}

        minimise(run, classifier, dataset, loss, optimizer=build_optimizer(classifier, recipe, world))


def shifted(images: Tensor, limit: int) -> Tensor:
    """Images [B, 3, H, W] moved together by up to `limit` pixels each way; what enters repeats the border."""
    if limit == 0:
        return images
    top, left = torch.randint(2 * limit + 1, (2,)).tolist()
    padded = F.pad(images, (limit,) * 4, mode="replicate")
    return padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]
