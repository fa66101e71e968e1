"""What a cell of the learning benchmark does: train a network by a job of the project, or draw images and look at them.

Everything is on one thread of a CPU in fp32, so that the CPU time of one process is comparable with another's.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from grpo.__main__ import JOBS
from grpo.config import EXPORT_NAME, SHIPPED_RECIPES, Data, Evaluation, Model, Sampling, Tokenizer, load_recipe
from grpo.config.recipe import RUN_FILES
from grpo.config.registry import RECIPES
from grpo.data import build_dataset
from grpo.evaluation import (
    ClassifierJudge,
    DatasetImages,
    DrawnImages,
    FeatureStatistics,
    Measured,
    classes_in_turn,
    classifier_gap,
    compare,
    frechet_distance,
    measure_images,
)
from grpo.models import load_classifier
from grpo.observe import image_grid
from grpo.parallel import World
from grpo.rollout import load_sampler

CPU = torch.device("cpu")
IMAGE_SIZE, NUM_CLASSES, CODEBOOK_SIZE = 24, 10, 256
DRAWN_AT_ONCE = 500
CURVE_POINTS = 40
GRID_IMAGES = 20
Metrics = dict[str, Any]


def train(world: World, *, job: str, config: str, folder: Path, flags: Mapping[str, object]) -> Metrics:
    """Run a job with a recipe of the quickstart and leave its weights in `folder`.

    Returns:
        cpu_seconds of this process, wall seconds, steps, and the curve of its metrics.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was ended
    given = {"metrics.run_dir": folder, "training.mixed_precision": "fp32", **flags}
    file = SHIPPED_RECIPES / "quickstart" / f"{config}.toml"
    arguments = ["--config", str(file), *(text for key, value in given.items() for text in (f"--{key}", str(value)))]
    recipe = load_recipe(RECIPES[job], arguments, needs_files=True)
    module = import_module(f"grpo.jobs.{JOBS[job]}")
    cpu, wall = time.process_time(), time.perf_counter()
    module.train(recipe, world)
    took = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    curve = curve_of((folder / "metrics.jsonl").read_text().splitlines())
    for left in folder.iterdir():  # only the weights are used
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name not in RUN_FILES:
            left.unlink()
    return {**took, "steps": recipe.training.steps, "curve": curve}


def curve_of(lines: Sequence[str]) -> dict[str, list[float]]:
    """Some metrics of a run, each value the mean over one of at most `CURVE_POINTS` equal parts of its steps."""
    steps = [json.loads(line) for line in lines]
    size = math.ceil(len(steps) / CURVE_POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    names = [name for name in ("step", "loss", "kl", "aux_ce", "entropy", "reward_mean") if name in steps[-1]]
    return {name: [round(fmean(step[name] for step in part), 5) for part in parts] for name in names}


def seconds_a_step(
    world: World, *, job: str, config: str, folder: Path, flags: Mapping[str, object], timing: float
) -> Metrics:
    """CPU time of a job: of one step, and of what comes once, from a short run and one longer by `timing` seconds."""

    def run(steps: int) -> float:
        given = {**flags, "training.steps": steps}
        return train(world, job=job, config=config, folder=folder, flags=given)["cpu_seconds"]

    run(1)  # what comes once in a process
    few, some = run(2), run(6)
    more = 6 + min(300, math.ceil(timing / max((some - few) / 4, 0.005)))
    step = max((run(more) - some) / (more - 6), 1e-3)
    shutil.rmtree(folder)
    return {"cpu_seconds_a_step": step, "cpu_seconds_once": max(some - 6 * step, 0.0), "trial_steps": more}


def look(
    models: Path,
    *,
    weights: str,
    tokenizer: str,
    point: tuple[float, float],
    count: int,
    seed: int,
    judge: tuple[str, str],
    rounds: int = 0,
    grid: Path | None = None,
) -> Metrics:
    """Draw `count` images, classes in turn, and show them to a judge.

    Args:
        models: folder of all weights; `weights` and `tokenizer` are below it.
        point: guidance and temperature.
        judge: name of the classifier, and the split of the digits that it compares with.
        rounds: of the bootstrap over images.
        grid: file for a picture of the first images.

    Returns:
        How the images were drawn, `compare`'s metrics, entropy in nats a code, and what `resampled` gives.
    """
    cpu = time.process_time()
    sampling = {"cfg_scale": point[0], "temperature": point[1], "seed": seed, "batch_size": DRAWN_AT_ONCE}
    files = {"codebook_size": CODEBOOK_SIZE, "downsample_size": 4, "checkpoint": str(models / tokenizer)}
    sampler = load_sampler(
        Model(name="GPT-digits", num_classes=NUM_CLASSES, checkpoint=str(models / weights)),
        Tokenizer(name="VQ-digits", **files),
        Sampling(image_size=IMAGE_SIZE, mixed_precision="fp32", **sampling),
        device=CPU,
    )
    images = DrawnImages(classes_in_turn(range(NUM_CLASSES), count), sampler)
    network, reward = (ClassifierJudge(load_classifier(models / name / EXPORT_NAME)) for name in (judge[0], "reward"))
    data = Data(name="digits", split=judge[1], image_size=IMAGE_SIZE)
    digits = DatasetImages(build_dataset(data, num_classes=NUM_CLASSES))
    see = partial(measure_images, judge=network, batch_size=DRAWN_AT_ONCE)
    reference, seen = see(digits), see(images, reward=reward)
    if grid is not None:
        image_grid(images.pixels(0, GRID_IMAGES), columns=GRID_IMAGES).save(grid)
    metrics: Metrics = {"cfg_scale": point[0], "temperature": point[1], "forwards": 1 if point[0] == 1 else 2}
    metrics |= compare(seen, reference, settings=Evaluation(kid_subsets=1))  # KID is not used, and slow
    metrics |= {"gap": classifier_gap(seen), "entropy": sampler.entropy(), "images": count}
    return {**metrics, **resampled(seen, reference, rounds=rounds), "cpu_seconds": time.process_time() - cpu}


def resampled(seen: Measured, reference: Measured, *, rounds: int) -> dict[str, list[float]]:
    """FID and accuracy of `rounds` samples with replacement of the drawn images; the digits stay as they are.

    Image i of every cell has the same class, and round r takes the same images of every cell of so many: differences
    between cells are paired by round.
    """
    count, generator = len(seen.features), torch.Generator().manual_seed(0)
    features, real = seen.features.double(), reference.gaussian(CPU)
    right = (seen.probabilities.argmax(dim=1) == seen.class_ids).double()
    found: dict[str, list[float]] = {"fid_rounds": [], "accuracy_rounds": []} if rounds else {}
    for _ in range(rounds):
        times = torch.randint(count, (count,), generator=generator).bincount(minlength=count).double()  # [N]
        mean = times @ features / count
        offset = features - mean
        covariance = (offset * times[:, None]).T @ offset / (count - 1)
        found["fid_rounds"].append(round(frechet_distance(FeatureStatistics(mean, covariance), real), 5))
        found["accuracy_rounds"].append(round((times @ right / count).item(), 5))
    return found
