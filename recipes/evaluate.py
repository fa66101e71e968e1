"""FID and its companions of a checkpoint, or of a folder or .npz of images, against a named reference.

python recipes/evaluate.py --evaluation.images samples.npz --evaluation.reference reference.npz \\
    --evaluation.inception_checkpoint weights-inception-2015-12-05-6726825d.pth --evaluation.json_path result.json
torchrun --nproc_per_node=8 recipes/evaluate.py --config evaluate.toml
"""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # recipes/grpo.py would be imported in place of the package grpo
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from grpo.config import EvaluateRecipe, Evaluation, load_recipe
from grpo.data import build_dataset
from grpo.evaluation import (
    ClassifierJudge,
    DatasetImages,
    DrawnImages,
    ImageSource,
    InceptionJudge,
    Judge,
    classes_in_turn,
    describe_classes,
    evaluate_images,
    fingerprint,
    make_writable,
    open_images,
)
from grpo.models import load_classifier
from grpo.observe import environment, progress
from grpo.parallel import World, distributed, run_main
from grpo.training.image_sampler import load_sampler


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, measure."""
    recipe = load_recipe(EvaluateRecipe, arguments)
    with distributed(recipe.parallel.timeout) as world:
        evaluate(recipe, world)


def evaluate(recipe: EvaluateRecipe, world: World) -> None:
    """The whole job on this rank; the numbers do not depend on the number of ranks."""
    config = recipe.evaluation
    if config.json_path is not None and world.is_main:
        make_writable(config.json_path, key="evaluation.json_path")
    judges = build_judges(config, world)
    reward = None
    if config.reward_checkpoint is not None:
        reward = ClassifierJudge(load_classifier(config.reward_checkpoint).to(world.device))
    reference = open_reference(recipe)
    images = open_evaluated(recipe, world)
    metrics = {
        name: evaluate_images(
            images,
            reference,
            judge,
            batch_size=config.batch_size,
            device=world.device,
            reward=reward,
            nearest_k=config.nearest_k,
            kid_subset_size=config.kid_subset_size,
            kid_subsets=config.kid_subsets,
            progress=partial(progress, description=f"look at images ({name})", show=world.is_main),
        )
        for name, judge in judges.items()
    }
    if world.is_main:
        report(recipe, metrics, images=images, reference=reference, world=world)


def build_judges(config: Evaluation, world: World) -> dict[str, Judge]:
    """The networks that look at the images, by name."""
    judges: dict[str, Judge] = {}
    if config.feature_checkpoint is not None:
        judges["classifier"] = ClassifierJudge(load_classifier(config.feature_checkpoint).to(world.device))
    if config.inception_checkpoint is not None:
        judges["inception"] = InceptionJudge(config.inception_checkpoint, device=world.device)
    return judges


def open_reference(recipe: EvaluateRecipe) -> ImageSource:
    """A folder or .npz, or the images of [data]."""
    config = recipe.evaluation
    if config.reference is not None:
        return open_images(config.reference, limit=config.num_reference_images)
    dataset = build_dataset(recipe.data, num_classes=recipe.model.num_classes)
    return DatasetImages(dataset, limit=config.num_reference_images)


def open_evaluated(recipe: EvaluateRecipe, world: World) -> ImageSource:
    """A folder or .npz, or images drawn from the model as they are looked at."""
    config, sampling = recipe.evaluation, recipe.sampling
    if config.images is not None:
        return open_images(config.images, limit=config.num_images)
    sampler = load_sampler(recipe.model, recipe.tokenizer, sampling, device=world.device)
    classes = range(recipe.model.num_classes) if sampling.class_ids == "all" else sampling.class_ids
    return DrawnImages(classes_in_turn(classes, config.num_images), sampler)


def report(
    recipe: EvaluateRecipe,
    metrics: dict[str, dict[str, float]],
    *,
    images: ImageSource,
    reference: ImageSource,
    world: World,
) -> None:
    """Print the metrics and write them down with everything that they depend on."""
    for judge, values in metrics.items():
        print(judge, *(f"  {name:<20} {value:.6g}" for name, value in values.items()), sep="\n")
    path = recipe.evaluation.json_path
    if path is None:
        return
    result = {
        "metrics": metrics,
        "images": describe_evaluated(recipe, images),
        "reference": describe_reference(recipe, reference),
        "judges": {
            name: fingerprint(file)
            for name, file in {
                "classifier": recipe.evaluation.feature_checkpoint,
                "inception": recipe.evaluation.inception_checkpoint,
                "reward": recipe.evaluation.reward_checkpoint,
            }.items()
            if file is not None
        },
        "settings": recipe.evaluation.model_dump(include={"nearest_k", "kid_subset_size", "kid_subsets"}),
        "processes": world.size,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
    }
    Path(path).write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


def describe_evaluated(recipe: EvaluateRecipe, images: ImageSource) -> dict[str, object]:
    """What was measured: the files, or the checkpoints and how images were drawn from them."""
    config, sampling = recipe.evaluation, recipe.sampling
    counted = describe_classes(images)
    if config.images is not None:
        return {"source": fingerprint(config.images), "resize": "none", **counted}
    return {
        "source": {
            "model": {"spec": recipe.model.name, **fingerprint(recipe.model.checkpoint)},
            "tokenizer": {"spec": recipe.tokenizer.name, **fingerprint(recipe.tokenizer.checkpoint)},
        },
        "sampler": {"method": "autoregressive", **sampling.model_dump(exclude={"class_ids", "resize_to"})},
        "resize": "none" if sampling.resize_to is None else f"bicubic, antialiased, to {sampling.resize_to}",
        **counted,
    }


def describe_reference(recipe: EvaluateRecipe, reference: ImageSource) -> dict[str, object]:
    """What it was measured against."""
    path = recipe.evaluation.reference
    if path is not None:
        published = reference.inception_statistics is not None
        statistics = "mu and sigma of the file (Inception only)" if published else "of the images"
        return {
            "source": fingerprint(path),
            "resize": "none",
            "statistics": statistics,
            **describe_classes(reference),
        }
    data = recipe.data.model_dump(include={"name", "path", "split"})
    return {"source": data, "resize": f"centre crop to {recipe.data.image_size}", **describe_classes(reference)}


if __name__ == "__main__":
    run_main(main)
