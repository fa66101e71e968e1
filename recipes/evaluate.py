"""FID and its companions of a checkpoint, or of a folder or .npz of images, against a named reference.

grpo evaluate runs/NAME --evaluation.feature_checkpoint judge.safetensors --evaluation.json_path result.json
grpo evaluate --evaluation.images samples.npz --evaluation.reference reference.npz \\
    --evaluation.inception_checkpoint weights-inception-2015-12-05-6726825d.pth --evaluation.json_path result.json
torchrun --nproc_per_node=8 -m grpo evaluate --config evaluate.toml
grpo evaluate --evaluation.scores geneval/results.jsonl --evaluation.json_path result.json
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("evaluate")

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import file_digest
from pathlib import Path

import torch

from grpo.config import EvaluateRecipe, Evaluation, load_recipe, of_run, read_text, reading, writing
from grpo.data import build_dataset, open_captions
from grpo.environment import environment
from grpo.evaluation import (
    DatasetImages,
    ImageSource,
    KeptImages,
    compare,
    judge_files,
    load_judges,
    make_writable,
    measure_images,
    measure_shapes,
    open_images,
    read_scores,
)
from grpo.formats import ADAPTER_WEIGHTS
from grpo.jobs.generate import asked_prompts, drawn_images
from grpo.observe import finite, progress, write_atomically
from grpo.parallel import World, distributed
from grpo.shapes import Fitting
from grpo.texts import Prompt


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, measure."""
    recipe = load_recipe(EvaluateRecipe, of_run(EvaluateRecipe, arguments), needs_files=True).explicit()
    if recipe.evaluation.scores is not None:
        add_scores(recipe.evaluation)
        return
    with distributed(recipe.parallel.timeout) as world:
        evaluate(recipe, world)


def evaluate(recipe: EvaluateRecipe, world: World) -> None:
    """The whole job on this rank; the numbers do not depend on the number of ranks."""
    config = recipe.evaluation
    if config.json_path is not None and world.is_main:
        make_writable(config.json_path, key="evaluation.json_path")
    judges = load_judges(config, device=world.device)
    reward = judges.pop("reward", None)
    reference = open_reference(recipe)
    if config.images is None:
        prompts = asked_texts(recipe, config.num_images)
        images = KeptImages(drawn_images(recipe, config.num_images, prompts, device=world.device))
    else:
        images = open_images(config.images, limit=config.num_images)
    metrics = {}
    for name, judge in judges.items():
        show = partial(progress, description=f"look at images ({name})", show=world.is_main)
        look = partial(measure_images, judge=judge, batch_size=config.batch_size, device=world.device, progress=show)
        against, seen = look(reference), look(images, reward=reward)
        if world.is_main:
            metrics[name] = compare(seen, against, settings=config, device=world.device)
    if "reader" in judges:
        texts = [prompt.text for prompt in prompts]
        readers = {"reader": judges["reader"].read, "fit": Fitting()}
        read = measure_shapes(images, texts, readers, batch_size=config.batch_size, device=world.device)
        metrics = {name: {**metrics.get(name, {}), **read.get(name, {})} for name in (*judges, "fit")}
    if not world.is_main:
        return
    for name, values in metrics.items():
        print(name, *(f"  {metric:<20} {value:.6g}" for metric, value in values.items()), sep="\n")
    result = describe(recipe, images, reference)
    for departure in result["protocol"]["departures"]:
        print(f"not {config.protocol}'s protocol: {departure}")
    if config.json_path is not None:
        numbers = {name: finite(values) for name, values in metrics.items()}
        result = {"metrics": numbers, **result, "processes": world.size}
        with writing(f"evaluation.json_path {config.json_path}"):
            write_atomically(Path(config.json_path), json.dumps(result, indent=2, allow_nan=False) + "\n")
        print(f"written to {config.json_path}")


def asked_texts(recipe: EvaluateRecipe, count: int) -> list[Prompt]:
    """What a model of texts draws: `count` prompts in turn, or the captions of so many reference images.

    Nothing for a model that takes classes.
    """
    prompts = asked_prompts(recipe.sampling)
    if recipe.asks_captions:
        captions = open_captions(recipe.data).captions_of
        texts = [captions.of(index)[0] for index in range(min(count, len(captions)))]
        prompts = [Prompt(text, str(number), {"prompt": text}) for number, text in enumerate(texts)]
    return [prompts[number % len(prompts)] for number in range(count)] if prompts else []


def add_scores(config: Evaluation) -> None:
    """Put what a published scorer found into the results, whose other metrics stay as they are."""
    name, scores = read_scores(config.scores)
    path, result = Path(config.json_path), {}
    make_writable(path, key="evaluation.json_path")
    if path.exists():
        with reading(f"evaluation.json_path {path} cannot be read", remedy="give another path"):
            result = json.loads(read_text(path))
    with reading(f"evaluation.json_path {path} is no file of results", remedy="give another path"):
        result["metrics"] = {**result.get("metrics", {}), name: scores}
        result["scores"] = {**result.get("scores", {}), name: fingerprint(config.scores)}
    with writing(f"evaluation.json_path {path}"):
        write_atomically(path, json.dumps(result, indent=2) + "\n")
    print(name, *(f"  {metric:<20} {value:.6g}" for metric, value in scores.items()), sep="\n")
    print(f"written to {path}")


def open_reference(recipe: EvaluateRecipe) -> ImageSource:
    """A folder or .npz, or the images of [data]."""
    config = recipe.evaluation
    if config.reference is not None:
        return open_images(config.reference, limit=config.num_reference_images)
    num_classes = None if recipe.model.is_text else recipe.model.num_classes
    dataset = build_dataset(recipe.data, num_classes=num_classes)  # counted, not compared
    return DatasetImages(dataset, limit=config.num_reference_images)


def describe(recipe: EvaluateRecipe, images: ImageSource, reference: ImageSource) -> dict[str, object]:
    """Everything that the metrics depend on: files, checkpoints, how images were drawn, settings, versions."""
    config = recipe.evaluation
    return {
        "images": {**describe_images(recipe), **describe_classes(images)},
        "reference": {**describe_reference(recipe, reference), **describe_classes(reference)},
        "protocol": {"name": config.protocol, "departures": departures(recipe, images, reference)},
        "judges": {name: fingerprint(file) for name, file in judge_files(config).items()},
        "settings": config.model_dump(include={"nearest_k", "kid_subset_size", "kid_subsets", "protocol"}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
    }


def departures(recipe: EvaluateRecipe, images: ImageSource, reference: ImageSource) -> list[str]:
    """A line for everything that is not as the recipe's protocol says; none without a protocol."""
    lines = recipe.departures()
    if recipe.evaluation.protocol != "none":
        if len(images) < recipe.evaluation.num_images:
            lines.append(f"evaluation.images has {len(images)} images, not {recipe.evaluation.num_images}")
        if reference.inception_statistics is None or reference.spatial_statistics is None:
            lines.append("evaluation.reference has no mu, sigma, mu_s and sigma_s of a whole data set")
    return lines


def describe_images(recipe: EvaluateRecipe) -> dict[str, object]:
    """What was measured: the files, or the checkpoints and how images were drawn from them."""
    sampling, described_apart = recipe.sampling, {"class_ids", "resize_to", "resize_filter"}
    if recipe.evaluation.images is not None:
        return {"source": fingerprint(recipe.evaluation.images), "resize": "none"}
    adapter = {}
    if recipe.model.adapter is not None:
        adapter = {"adapter": fingerprint(f"{recipe.model.adapter}/{ADAPTER_WEIGHTS}")}
    return {
        "source": {
            "model": {"spec": recipe.model.name, **fingerprint(recipe.model.checkpoint), **adapter},
            "tokenizer": {"spec": recipe.tokenizer.name, **fingerprint(recipe.tokenizer.checkpoint)},
        },
        "sampler": {"method": "autoregressive", **sampling.model_dump(exclude=described_apart)},
        **describe_prompts(recipe),
        "resize": "none" if sampling.resize_to is None else f"{sampling.resize_filter} to {sampling.resize_to}",
    }


def describe_prompts(recipe: EvaluateRecipe) -> dict[str, object]:
    """By which texts images were drawn, and what encoded them; nothing for classes."""
    sampling, text = recipe.sampling, recipe.text
    if not recipe.model.is_text:
        return {}
    files = {name: path for name, path in (("features", text.features), ("path", text.path)) if path is not None}
    asked = fingerprint(sampling.prompts) if sampling.prompts else {"prompt": sampling.prompt}
    return {"prompts": asked, "text": {"encoder": text.encoder, **(files if text.encoder == "t5" else {})}}


def describe_reference(recipe: EvaluateRecipe, reference: ImageSource) -> dict[str, object]:
    """What it was measured against."""
    path = recipe.evaluation.reference
    if path is None:
        data = recipe.data.model_dump(include={"name", "path", "split"})
        return {"source": data, "resize": f"centre crop to {recipe.data.image_size}"}
    inception = "the file's" if reference.inception_statistics is not None else "of the images"
    spatial = "the file's" if reference.spatial_statistics is not None else "of the images"
    statistics = {"classifier": "of the images", "inception": inception, "inception_spatial": spatial}
    return {"source": fingerprint(path), "resize": "none", "statistics": statistics}


def describe_classes(images: ImageSource) -> dict[str, object]:
    """Number of images, and of each class where the classes are known."""
    counts = None if images.class_ids is None else torch.bincount(images.class_ids).tolist()
    return {"count": len(images), "class_counts": counts}


def fingerprint(path: str) -> dict[str, str]:
    """A file's path and SHA-256, by which others can tell whether theirs is the same; of a folder the path alone."""
    if Path(path).is_dir():
        return {"path": path}
    with open(path, "rb") as file:
        return {"path": path, "sha256": file_digest(file, "sha256").hexdigest()}
