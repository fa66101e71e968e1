"""Runs of a training job for every combination of some keys' values, one after another, and what they come to.

grpo sweep train --config debug --optimizer.lr 1e-5,3e-5 --training.seed 0,1,2
grpo sweep train --config c2i_b_256 --training.seed 0,1,2 --nproc 8
grpo sweep train --config c2i_b_256 --training.seed 0,1,2 --nproc 8 --slurm > sweep.sh

The first word is the job: train, pretrain, distill, finetune, tokenizer, classifier or reader; without it, that of the
recipe file. Its flags follow. A flag with commas has several values, unless its key takes a list by itself; a flag
given several times has each time one value. A run is named by what differs, such as lr=1e-05,seed=0, and has a folder
of that name in --metrics.run_dir (runs/<name of the recipe file>-sweep). All recipes are checked before the first run
starts. The same command once more passes over what is finished and goes on with the rest. At the end the runs are
compared. The exit code is 1 if one of them failed.

--nproc N   processes of each run, under torchrun, one for a GPU
--print     only check the recipes and print the commands
--slurm     only check the recipes and print a script for sbatch, an array with a task for each run
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("sweep")

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.config import RECIPES, TrainingRecipe, UserError, did_you_mean, job_of_file
from grpo.jobs.compare import compare_runs
from grpo.observe import read_metrics
from grpo.training.sweep import FAILED, SweepRun, plan, run_all, slurm_script

JOBS = [job for job, recipe in RECIPES.items() if issubclass(recipe, TrainingRecipe)]


def main(arguments: Sequence[str]) -> None:
    """Check all recipes; print commands, or do the runs and compare them."""
    if "RANK" in os.environ:
        raise UserError("grpo sweep starts the processes of its runs itself: give --nproc N instead of torchrun")
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--print", "--dry-run", action="store_true", dest="prints")
    parser.add_argument("--slurm", action="store_true")
    try:
        own, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    if own.nproc is not None and own.nproc < 1:
        raise UserError(f"--nproc {own.nproc} must be at least 1")
    job, flags = job_and_flags(rest)
    folder, runs = plan(job, flags, ranks=own.nproc)
    if own.prints or own.slurm:
        print_commands(folder, runs, made_by=["grpo", "sweep", *arguments], slurm=own.slurm)
        return
    ends = run_all(runs, say=lambda line: print(line, flush=True))
    compare(folder, runs)
    failed = [name for name, end in ends.items() if end.startswith(FAILED)]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {' '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def job_and_flags(words: Sequence[str]) -> tuple[str, list[str]]:
    """The job, by its word or by the recipe file, and its flags."""
    if not words:
        raise UserError("grpo sweep takes a job and its flags, such as: train --config debug --training.seed 0,1,2")
    if words and not words[0].startswith("-"):
        job, flags = words[0], list(words[1:])
    else:
        parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        parser.add_argument("--config", default="")
        flags = list(words)
        job = job_of_file(parser.parse_known_args(flags)[0].config) or JOBS[0]
    if job not in JOBS:
        raise UserError(f"{job}: no job that trains; {did_you_mean(job, JOBS)}")
    return job, flags


def print_commands(folder: Path, runs: Sequence[SweepRun], *, made_by: Sequence[str], slurm: bool) -> None:
    """The commands of the runs that are not finished, a line each, or as a script for SLURM."""
    left = [run for run in runs if not run.is_finished()]
    if slurm and not left:
        raise UserError(f"all {len(runs)} runs in {folder} are finished: nothing to submit")
    if slurm:
        print(slurm_script(left, name=folder.name, made_by=made_by, then=comparison(folder, runs)))
        return
    print(*(shlex.join(run.words) for run in left), sep="\n")
    if len(left) < len(runs):
        print(f"# finished before: {len(runs) - len(left)} of {len(runs)}")


def comparison(folder: Path, runs: Sequence[SweepRun]) -> list[str]:
    """The command that compares runs."""
    return ["grpo", "compare", *(str(run.folder) for run in runs), "--html", str(folder / "compare.html")]


def compare(folder: Path, runs: Sequence[SweepRun]) -> None:
    """Tables and the page of the runs that have metrics, and the command that makes them anew."""
    found = [run for run in runs if read_metrics(run.folder / "metrics.jsonl")]
    if len(found) < 2:
        print("fewer than two runs have metrics: nothing to compare")
        return
    compare_runs([str(run.folder) for run in found], allowed=[], html=str(folder / "compare.html"))
    print(f"once more: {shlex.join(comparison(folder, found))}")
