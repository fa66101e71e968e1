"""From nothing to an image generator that GRPO has improved, in minutes: digits, on two CPU cores or one GPU.

grpo quickstart [--recipe class|vapi] [--seed N] [--run-dir FOLDER] [--configs FOLDER]

--recipe    class (default): free-running samples, rewarded by a classifier; vapi: teacher-forced, rewarded by likeness
--seed      of tokenizer, generator and GRPO; default 0
--run-dir   default runs/quickstart
--configs   folder of the phases' recipes: a changed copy of train_configs/quickstart, which is the default

Every phase is a job with a recipe of its own in train_configs/quickstart and can be run by itself as well, for instance
`grpo pretrain --config quickstart/pretrain`. A finished phase is not done again unless its recipe, or a phase that it
builds on, has changed.
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("quickstart")

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

from grpo.config import (
    SHIPPED_RECIPES,
    ClassifierRecipe,
    DistillRecipe,
    EvaluateRecipe,
    GRPORecipe,
    PretrainRecipe,
    Recipe,
    TokenizerRecipe,
    load_recipe,
)
from grpo.environment import environment
from grpo.evaluation import classifier_gap, compare, load_judges, measure_images
from grpo.jobs.distill import train as distill
from grpo.jobs.evaluate import open_reference
from grpo.jobs.generate import drawn_images
from grpo.jobs.pretrain import train as train_generator
from grpo.jobs.train_classifier import train as train_classifier
from grpo.jobs.train_grpo import train as train_policy
from grpo.jobs.train_tokenizer import train as train_tokenizer
from grpo.observe import History, image_grid, progress, write_atomically, write_report
from grpo.parallel import World, distributed
from grpo.training import EXPORT_NAME, Phase, run_phases

CONFIGS = SHIPPED_RECIPES / "quickstart"
GUIDANCE, TEMPERATURES = (1.25, 1.5, 1.75), (0.9, 1.0)  # the rival row's grid: what sampling alone can do, tuned
TUNING_SPLIT = "validation"
GRID_NAME, GRID_IMAGES, GRID_COLUMNS = "samples.png", 100, 20
TIMEOUT_SECONDS = 600
CPU_RANKS = 2

COLUMNS = {
    "reward": "reward_mean",
    "accuracy": "accuracy",
    "FID": "fid",
    "precision": "precision",
    "recall": "recall",
    "entropy": "entropy",
    "gap": "classifier_gap",
}
"""Columns of the final table and the metrics in them."""

NOTES = [
    "reward: mean log p(class | image) under the classifier that rewarded. All else is seen by a second classifier of "
    "other digits: accuracy, FID, precision and recall in its features, against the digits of the split "
    "{split!r}, on which no phase was trained.",
    "FID here is not the FID of the literature, whose features are Inception's; compare it within this table only.",
    "entropy: of the drawn codes, nats a code. gap: how much surer of the class the rewarding classifier is "
    "than the judging one, nats; it grows when the reward is deceived.",
    "Base with guidance is the rival: nothing to train, but two forward passes to sample. Of a grid of guidance "
    f"{', '.join(map(str, GUIDANCE))} and temperature {', '.join(map(str, TEMPERATURES))} it is the point whose FID "
    f"against the digits of the split {TUNING_SPLIT!r} is lowest.",
    "One seed: a run with another seed differs by as much as rows do.",
]

NEXT = {
    "class": "Next: the teacher-forced recipe on the same base model, grpo quickstart --recipe vapi; or "
    f"set aux_ce_weight = 0 in a copy of {CONFIGS} (--configs) and watch recall fall.",
    "vapi": "Next: the free-running recipe on the same base model, grpo quickstart; or your own images, "
    "docs/quickstart.md.",
}


def main(arguments: Sequence[str]) -> None:
    """Read the flags, join the process group, do what is not done yet, report."""
    options = parse(arguments)
    if "RANK" not in os.environ and not torch.cuda.is_available() and (os.cpu_count() or 1) >= CPU_RANKS:
        plan(options)  # a mistake in the recipes is told before anything is started
        start_on_cpu(arguments)
    started = time.perf_counter()
    with distributed(TIMEOUT_SECONDS) as world:
        phases = plan(options)
        console = Console(quiet=not world.is_main, highlight=False)
        run_phases(phases, world, say=partial(console.print, markup=False))
        if world.is_main:
            report(options, phases, console, seconds=time.perf_counter() - started)


def start_on_cpu(arguments: Sequence[str]) -> NoReturn:
    """Become the launcher of this job on two ranks of one thread.

    On a CPU they are faster than one rank of two threads, whose small operations mostly wait for each other; and where
    other programs use the cores too, such waiting made training ten times slower. A rank that is lost costs its phase.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={CPU_RANKS}", "--max-restarts=3"]
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "grpo", "quickstart", *arguments])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="grpo quickstart", allow_abbrev=False, add_help=False)
    parser.add_argument("--recipe", choices=("class", "vapi"), default="class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--configs", type=Path, default=CONFIGS)
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> list[Phase]:
    """The phases in their order, each reading what those before it have written."""
    free = options.recipe == "class"
    improved = "grpo" if free else "grpo_vapi"
    make = partial(phase, options.run_dir, options.configs)
    seed = {"training.seed": options.seed}
    tokenizer = {"tokenizer.checkpoint": "tokenizer"}
    judges = {
        "evaluation.reward_checkpoint": "classifier_reward",
        "evaluation.feature_checkpoint": "classifier_judge",
    }
    reward = {"reward.class_log_prob.checkpoint": "classifier_reward"} if free else {}

    def weights(maker: str) -> dict[str, str]:
        return {**tokenizer, "model.checkpoint": maker}

    def judged(maker: str, title: str, name: str = "", job: Callable[..., None] = evaluate) -> Phase:
        return make(name or f"evaluate_{maker}", title, EvaluateRecipe, job, inputs={**weights(maker), **judges})

    def trained(
        name: str, title: str, recipe: type[Recipe], job: Callable[..., None], inputs: Mapping[str, str]
    ) -> Phase:
        return make(name, f"Generator: {title}", recipe, job, inputs=inputs, settings=seed)

    start = "distill" if free else "pretrain"
    phases = [
        make("tokenizer", "Tokenizer", TokenizerRecipe, train_tokenizer, settings=seed),
        make("classifier_reward", "Classifier that rewards", ClassifierRecipe, train_classifier),
        make("classifier_judge", "Classifier that judges", ClassifierRecipe, train_classifier),
        trained("pretrain", "pre-training", PretrainRecipe, train_generator, tokenizer),
        trained("pretrain_more", "more of it, the rival", PretrainRecipe, train_generator, weights("pretrain")),
        trained("distill", "distillation", DistillRecipe, distill, weights("pretrain")),
        trained(improved, "GRPO", GRPORecipe, train_policy, {**weights(start), **reward}),
        judged("pretrain", "base", "evaluate_base"),
        judged("pretrain", "base, tuned guidance", "evaluate_guided", evaluate_tuned),
        judged("pretrain_more", "more pre-training"),
        judged("pretrain_more", "more pre-training, tuned guidance", "evaluate_more_guided", evaluate_tuned),
        judged("distill", "distilled"),
        judged(improved, "after GRPO"),
    ]
    return [phase for phase in phases if free or phase.folder.name not in ("distill", "evaluate_distill")]


def phase(
    run_dir: Path,
    configs: Path,
    name: str,
    title: str,
    recipe_class: type[Recipe],
    job: Callable[..., None],
    *,
    inputs: Mapping[str, str] = MappingProxyType({}),
    settings: Mapping[str, object] = MappingProxyType({}),
) -> Phase:
    """A phase with its recipe read from its file.

    Args:
        inputs: key of the recipe that takes weights -> the phase that makes them.
        settings: other keys that are set from here.
    """
    folder, file = run_dir / name, name
    product = folder / EXPORT_NAME
    given = {"metrics.run_dir": folder}
    if recipe_class is EvaluateRecipe:
        file, product = "evaluate", folder / "result.json"
        given = {"evaluation.json_path": product}
        title = f"Evaluation: {title}"
    given |= {key: run_dir / maker / EXPORT_NAME for key, maker in inputs.items()} | dict(settings)
    flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    recipe = load_recipe(recipe_class, ["--config", str(configs / f"{file}.toml"), *flags])
    return Phase(title, recipe, job, product, tuple(inputs.values()))


def evaluate_tuned(recipe: EvaluateRecipe, world: World) -> None:
    """`evaluate` at the point of the grid that has the lowest FID on the tuning split."""
    judge, config = load_judges(recipe.evaluation, device=world.device)["classifier"], recipe.evaluation
    look = partial(measure_images, judge=judge, batch_size=config.batch_size, device=world.device)
    validation = recipe.model_copy(update={"data": recipe.data.model_copy(update={"split": TUNING_SPLIT})})
    reference, found = look(open_reference(validation)), {}
    for point in itertools.product(GUIDANCE, TEMPERATURES):
        sampling = recipe.sampling.model_copy(update=dict(zip(("cfg_scale", "temperature"), point, strict=True)))
        images = drawn_images(recipe.model_copy(update={"sampling": sampling}), config.num_images, device=world.device)
        found[point] = compare(look(images), reference, settings=config, device=world.device)["fid"], sampling
    _, sampling = min(found.values(), key=lambda entry: entry[0])  # the same on every rank
    evaluate(recipe.model_copy(update={"sampling": sampling}), world)


def evaluate(recipe: EvaluateRecipe, world: World) -> None:
    """Draw samples, show them to both classifiers, write result.json and samples.png beside it."""
    config, judges = recipe.evaluation, load_judges(recipe.evaluation, device=world.device)
    look = partial(measure_images, batch_size=config.batch_size, device=world.device)
    reference = look(open_reference(recipe), judges["classifier"])
    samples = drawn_images(recipe, config.num_images, device=world.device)
    show = partial(progress, description="Samples", show=world.is_main)
    seen = look(samples, judges["classifier"], reward=judges["reward"], progress=show)
    entropy = samples.draw.entropy()
    if not world.is_main:
        return
    metrics = compare(seen, reference, settings=config, device=world.device)
    metrics |= {"entropy": entropy, "classifier_gap": classifier_gap(seen)}
    metrics |= recipe.sampling.model_dump(include={"cfg_scale", "temperature"})
    path = Path(config.json_path)
    image_grid(samples.pixels(0, GRID_IMAGES), columns=GRID_COLUMNS).save(path.with_name(GRID_NAME))
    path.write_text(json.dumps(metrics, indent=2) + "\n")


def row_name(phase: Phase, metrics: Mapping[str, float]) -> str:
    """The name of a row: of the rival with what was found for it."""
    name = phase.title.removeprefix("Evaluation: ")
    if phase.job is not evaluate_tuned:
        return name
    return f"{name.removesuffix('tuned guidance')}guidance {metrics['cfg_scale']}, temperature {metrics['temperature']}"


def write_results(options: argparse.Namespace, names: Sequence[str], results: Sequence[Mapping[str, float]]) -> None:
    """results.json: each row with how it was drawn and measured."""
    rows = [
        {"name": name, "forwards_per_image": 1 if metrics["cfg_scale"] == 1 else 2, "seed": options.seed, **metrics}
        for name, metrics in zip(names, results, strict=True)
    ]
    text = json.dumps({"recipe": options.recipe, "rows": rows, **environment()}, indent=2)
    write_atomically(options.run_dir / "results.json", text + "\n")


def report(options: argparse.Namespace, phases: Sequence[Phase], console: Console, *, seconds: float) -> None:
    """The table of results in the terminal, and report.html with curves and samples."""
    evaluations = [phase for phase in phases if isinstance(phase.recipe, EvaluateRecipe)]
    results = [json.loads(phase.product.read_text()) for phase in evaluations]
    names = [row_name(phase, metrics) for phase, metrics in zip(evaluations, results, strict=True)]
    write_results(options, names, results)
    count = evaluations[0].recipe.evaluation.num_images
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=f"{count} samples each")
    table.add_column()  # wraps where the terminal is narrow, so that the numbers stay whole
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, metrics in zip(names, results, strict=True):
        table.add_row(name, *(f"{metrics[key]:.3f}" for key in COLUMNS.values()))
    data = evaluations[0].recipe.data
    page = write_report(
        options.run_dir,
        title="Quickstart: GRPO on digits",
        summary=f"Recipe {options.recipe}, seed {options.seed}",
        table=[
            {"model": name, **{heading: metrics[key] for heading, key in COLUMNS.items()}}
            for name, metrics in zip(names, results, strict=True)
        ],
        images=[
            (f"{name}: the same seeds in each grid", phase.product.with_name(GRID_NAME))
            for name, phase in zip(names, evaluations, strict=True)
        ],
        curves=[
            (phase.title, History.read(phase.product.with_name("metrics.jsonl")))
            for phase in phases
            if phase not in evaluations
        ],
        notes=[note.format(split=data.split) for note in NOTES],
    )
    console.print(table)
    console.print(f"{page}: curves and samples. Done in {seconds / 60:.1f} minutes.", soft_wrap=True)
    console.print(NEXT[options.recipe], soft_wrap=True)
