"""From nothing to an image generator that GRPO has improved, in minutes, on two CPU cores or one GPU.

grpo quickstart [--recipe class|vapi|text] [--seed N] [--run-dir FOLDER] [--configs FOLDER]

--recipe    class (default): digits, free-running samples, rewarded by a classifier; vapi: digits, teacher-forced,
            rewarded by likeness; text: drawings of coloured shapes by their captions, rewarded for what is drawn
--seed      of tokenizer, generator and GRPO; default 0
--run-dir   default runs/quickstart, for text runs/quickstart_text
--configs   folder of the phases' recipes, a changed copy of all that `grpo recipes` lists under quickstart/ or
            quickstart_text/ and `grpo recipes NAME` prints; default: these

Every phase is a job with a recipe of its own in that folder and can be run by itself as well, for instance
`grpo pretrain --config quickstart/pretrain`. A finished phase is not done again unless its recipe, or a phase that it
builds on, has changed.
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("quickstart")

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NoReturn

import torch
from rich.console import Console

from grpo.config import EXPORT_NAME, EvaluateRecipe, Recipe, load_recipe
from grpo.environment import environment
from grpo.formats import read_weights
from grpo.jobs import _quickstart_digits, _quickstart_shapes
from grpo.observe import (
    Cell,
    History,
    Results,
    Table,
    duration,
    gallery,
    metric,
    table_lines,
    write_atomically,
    write_report,
)
from grpo.parallel import distributed
from grpo.training import GRID_NAME, Phase, in_words, run_phases

STORIES: Mapping[str, ModuleType] = {
    "class": _quickstart_digits,
    "vapi": _quickstart_digits,
    "text": _quickstart_shapes,
}
"""Recipe -> the module that tells its phases and what is shown of them."""
TUNED = ", tuned guidance"  # ends the names of rows whose sampling their phase finds
TIMEOUT_SECONDS = 600
CPU_RANKS = 2


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
    parser.add_argument("--recipe", choices=tuple(STORIES), default="class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--configs", type=Path)
    options = parser.parse_args(arguments)
    shipped = STORIES[options.recipe].CONFIGS
    options.configs, options.run_dir = options.configs or shipped, options.run_dir or Path("runs") / shipped.name
    return options


def plan(options: argparse.Namespace) -> list[Phase]:
    """The phases in their order, each reading what those before it have written."""
    return STORIES[options.recipe].plan(options, partial(phase, options.run_dir, options.configs))


def phase(
    run_dir: Path,
    configs: Path,
    name: str,
    title: str,
    recipe_class: type[Recipe],
    job: Callable[..., None],
    *,
    config: str | None = None,
    inputs: Mapping[str, str] = MappingProxyType({}),
    settings: Mapping[str, object] = MappingProxyType({}),
) -> Phase:
    """A phase with its recipe read from its file.

    Args:
        config: name of that file; None is "evaluate" for an evaluation, and else the name of the phase.
        inputs: key of the recipe that takes weights -> the phase that makes them.
        settings: other keys that are set from here.
    """
    folder, evaluates = run_dir / name, recipe_class is EvaluateRecipe
    product = folder / ("result.json" if evaluates else EXPORT_NAME)
    given: dict[str, object] = {"evaluation.json_path": product} if evaluates else {"metrics.run_dir": folder}
    given |= {key: run_dir / maker / EXPORT_NAME for key, maker in inputs.items()} | dict(settings)
    flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    file = configs / f"{config or ('evaluate' if evaluates else name)}.toml"
    recipe = load_recipe(recipe_class, ["--config", str(file), *flags])
    return Phase(f"Evaluation: {title}" if evaluates else title, recipe, job, product, tuple(inputs.values()))


def row_name(phase: Phase, metrics: Mapping[str, float]) -> str:
    """The name of a row: of the rival with what was found for it."""
    name = phase.title.removeprefix("Evaluation: ")
    if not name.endswith(TUNED):
        return name
    return f"{name.removesuffix(TUNED)}, guidance {metrics['cfg_scale']}, temperature {metrics['temperature']}"


def write_results(options: argparse.Namespace, names: Sequence[str], results: Sequence[Mapping[str, float]]) -> None:
    """results.json: each row with how it was drawn and measured."""
    rows = [
        {"name": name, "forwards_per_image": 1 if metrics["cfg_scale"] == 1 else 2, "seed": options.seed, **metrics}
        for name, metrics in zip(names, results, strict=True)
    ]
    text = json.dumps({"recipe": options.recipe, "rows": rows, **environment()}, indent=2)
    write_atomically(options.run_dir / "results.json", text + "\n")


def result_table(
    title: str, columns: Mapping[str, str], names: Sequence[str], results: Sequence[Mapping[str, float]]
) -> Table:
    """The rows with the metrics of these columns, for the terminal."""
    rows = [
        (name, [Cell(f"{row[key]:.3f}") for key in columns.values()]) for name, row in zip(names, results, strict=True)
    ]
    return Table(title, list(columns), rows)


def page_table(
    title: str, columns: Mapping[str, str], names: Sequence[str], results: Sequence[Mapping[str, float]]
) -> Table:
    """The same for the page, with differences to the first row."""
    values = {heading: [metrics[key] for metrics in results] for heading, key in columns.items()}
    better = {heading: metric(key).better for heading, key in columns.items()}
    note = "Small numbers: difference to the first row. Bold: the best of the column."
    return Results(names, values, better).by_name(title, note=note)


def phase_table(phases: Sequence[Phase]) -> Table:
    """How long each phase took, and of what trains a model, how many numbers its weights are."""
    rows = []
    for phase in phases:
        trains = phase.product.name == EXPORT_NAME
        count = sum(tensor.numel() for tensor in read_weights(phase.product).values()) if trains else 0
        rows.append((phase.title, [Cell(duration(phase.seconds)), Cell(in_words(count) if trains else "")]))
    return Table("Phases: their time and size", ["time", "parameters"], rows)


def write_story(
    options: argparse.Namespace, phases: Sequence[Phase], names: Sequence[str], results: Sequence[Mapping[str, float]]
) -> Path:
    """report.html: the tables, samples of the same requests, the curves of every phase, the last one first."""
    story = STORIES[options.recipe]
    evaluations = [phase for phase in phases if isinstance(phase.recipe, EvaluateRecipe)]
    trained = [phase for phase in reversed(phases) if phase not in evaluations]
    recipe, count = evaluations[0].recipe, evaluations[0].recipe.evaluation.num_images
    tables = [page_table(title.format(count=count), columns, names, results) for title, columns in story.TABLES.items()]
    grids = {name: phase.product.with_name(GRID_NAME) for name, phase in zip(names, evaluations, strict=True)}
    ends = {name: grids[name] for name in (names[0], names[-1])}
    others = {name: grid for name, grid in grids.items() if name not in ends}
    show = partial(gallery, side=recipe.data.image_size, captions=story.asked(recipe))
    return write_report(
        options.run_dir,
        title=story.TITLE,
        summary=f"Recipe {options.recipe}, seed {options.seed}; another seed would move all numbers",
        tables=[*tables, phase_table(phases)],
        notes=[note.format(split=recipe.data.split) for note in story.NOTES],
        galleries=[
            show("Before and after: the same requests and random numbers", ends),
            show("The other rows, the same requests and random numbers", others, folded=True),
        ],
        curves=[(phase.title, History.read(phase.folder / "metrics.jsonl")) for phase in trained],
        facts={"Time of all phases": duration(sum(phase.seconds for phase in phases)), "Folder": str(options.run_dir)},
        recipes=[(f"Recipe: {phase.title}", phase.recipe.to_toml()) for phase in trained],
    )


def report(options: argparse.Namespace, phases: Sequence[Phase], console: Console, *, seconds: float) -> None:
    """The table of results in the terminal, and report.html with curves and samples."""
    story = STORIES[options.recipe]
    evaluations = [phase for phase in phases if isinstance(phase.recipe, EvaluateRecipe)]
    results = [json.loads(phase.product.read_text()) for phase in evaluations]
    names = [row_name(phase, metrics) for phase, metrics in zip(evaluations, results, strict=True)]
    write_results(options, names, results)
    count = evaluations[0].recipe.evaluation.num_images
    tables = [
        result_table(title.format(count=count), columns, names, results) for title, columns in story.TABLES.items()
    ]
    page = write_story(options, phases, names, results)
    for table in tables:
        console.print(*table_lines(table, console.width), "", sep="\n", markup=False, soft_wrap=True)
    console.print(f"{page}: curves and samples. Done in {seconds / 60:.1f} minutes.", soft_wrap=True)
    console.print(story.NEXT[options.recipe].format(run_dir=options.run_dir), soft_wrap=True)
