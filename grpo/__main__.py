"""The command `grpo JOB ...`: training, sampling and measuring of autoregressive image generators.

`python -m grpo` and, for several ranks, `torchrun -m grpo` do the same. Nothing heavy is imported before a job runs.
"""

import ast
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from grpo.config import RECIPES, UserError, did_you_mean, help_text, help_topics, shipped_recipe
from grpo.restarts import MISTAKE, is_pointless, note_mistake

JOBS = {
    "train": "train_grpo",
    "pretrain": "pretrain",
    "distill": "distill",
    "finetune": "finetune",
    "tokenizer": "train_tokenizer",
    "classifier": "train_classifier",
    "reader": "train_reader",
    "encode": "encode",
    "encode-text": "encode_text",
    "generate": "generate",
    "evaluate": "evaluate",
    "sweep": "sweep",
    "compare": "compare",
    "convert": "convert",
    "share": "share",
    "demo": "demo",
    "quickstart": "quickstart",
    "memory": "memory",
    "doctor": "doctor",
}
"""Word of the command -> module of `grpo.jobs`, the folder recipes/ of a checkout."""

DRY_RUN = "--dry-run"
"""Flag of every job with a recipe: say what it would do, and whether it can."""

RECIPES_HELP = """\
grpo recipes lists the shipped recipes, grpo recipes NAME prints one, to copy and change;
grpo recipes --schema JOB prints the JSON Schema of a job's recipes, for editors."""


def main() -> NoReturn:
    """The console script `grpo`."""
    job, *arguments = sys.argv[1:] or ["--help"]
    if job in ("--help", "-h"):
        lines = [f"  {name:<12}{_documentation(name).splitlines()[0]}" for name in JOBS]
        _show(
            "\n".join(
                [
                    "usage: grpo JOB [flags]",
                    "",
                    *lines,
                    "",
                    "grpo JOB --help tells the flags of a job, grpo --version the version.",
                    RECIPES_HELP,
                ]
            )
        )
    if job in ("--version", "-V"):
        _show(_version())
    if job == "recipes":
        _show_recipes(arguments)
    if job not in JOBS:
        _refuse(f"{job}: unknown job; {did_you_mean(job, [*JOBS, 'recipes'])}")
    run_job(job, arguments)


def run_job(name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a job, or print its help, and end the process.

    Args:
        name: a key of `JOBS`.
        arguments: its flags; None takes those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    topics = help_topics(arguments)
    if topics is not None:
        try:
            _show(help_text(RECIPES[name], topics) if name in RECIPES else _documentation(name))
        except UserError as error:
            _refuse(str(error))
    if is_pointless():
        os._exit(MISTAKE)
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:  # a KeyboardInterrupt in the middle of an import ends in a long traceback, or is swallowed
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from grpo.parallel import run_main  # torch

    def main(_: Sequence[str]) -> None:
        if DRY_RUN in arguments and name in RECIPES:
            dry_run = import_module("grpo.training.dry_run").dry_run
            return dry_run(name, [word for word in arguments if word != DRY_RUN])
        job = import_module(f"grpo.jobs.{JOBS[name]}")
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        job.main(arguments)

    run_main(main)


def _version() -> str:
    try:
        return f"grpo {version('autoregressive-grpo')}"
    except PackageNotFoundError:
        return "grpo, not installed: a checkout that is on the path"


def _show_recipes(arguments: Sequence[str]) -> NoReturn:
    if help_topics(arguments) is not None:
        _show(RECIPES_HELP)
    if arguments[:1] == ["--schema"]:
        _show_schema(arguments[1:])
    if len(arguments) > 1:
        _refuse(f"recipes takes one name, got {len(arguments)}")
    try:
        _show(shipped_recipe(*arguments))
    except UserError as error:
        _refuse(str(error))


def _show_schema(jobs: Sequence[str]) -> NoReturn:
    if len(jobs) != 1 or jobs[0] not in RECIPES:
        _refuse(f"--schema takes one job: {', '.join(RECIPES)}")
    from grpo.config.schema import recipe_schema  # imports the kinds of rewards, and with them torch

    _show(json.dumps(recipe_schema(jobs[0]), indent=2))


def _documentation(job: str) -> str:
    """What a job's module says of itself; it is not imported for that."""
    file = Path(__file__).parent / "jobs" / f"{JOBS[job]}.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or job


def _show(text: str) -> NoReturn:
    """Print and end; whoever reads may have seen enough before the end."""
    with suppress(BrokenPipeError):
        print(text, flush=True)
    os._exit(0)  # a regular exit would flush once more into a closed pipe


def _refuse(line: str) -> NoReturn:
    if not is_pointless():
        print(line, file=sys.stderr)
    note_mistake()
    sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
