"""Several runs of one job that differ in some keys: what they are, and how they are done one after another."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.config import (
    RECIPES,
    Checkpoint,
    GRPORecipe,
    TrainingRecipe,
    UserError,
    changes_that_matter,
    load_recipe,
    printable,
    read_text,
    recipe_from_toml,
    variants,
    with_keys,
)
from grpo.training.dry_run import on_meta
from grpo.training.stop_request import SIGNALS

DONE, BEFORE, FAILED, NOT_STARTED = "finished", "finished before", "failed", "not started"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str  # what differs from the others, such as lr=1e-05,seed=0; of its folder, too
    recipe: TrainingRecipe
    command: list[str]  # after `grpo`
    ranks: int | None  # processes under torchrun; None is one without it

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def words(self) -> list[str]:
        """The command as a user types it."""
        if self.ranks is None:
            return ["grpo", *self.command]
        return ["torchrun", "--standalone", f"--nproc_per_node={self.ranks}", "-m", "grpo", *self.command]

    @property
    def process(self) -> list[str]:
        """The same by this Python, whatever the path has under those names."""
        launcher = [] if self.ranks is None else ["torch.distributed.run", *self.words[1:3], "-m"]
        return [sys.executable, "-m", *launcher, "grpo", *self.command]

    def is_finished(self) -> bool:
        """Whether its folder holds the whole of this run: by a recipe that is the same in all that matters."""
        try:
            beat = json.loads(read_text(self.folder / "heartbeat.json"))
            before = recipe_from_toml(type(self.recipe), read_text(self.folder / "recipe.toml"))
        except (OSError, ValueError, RecursionError, UserError):
            return False
        same_length = before.training.steps == self.recipe.training.steps
        is_whole = isinstance(beat, dict) and beat.get("finished") is True
        return is_whole and same_length and not changes_that_matter(before, self.recipe)


def plan(job: str, arguments: Sequence[str], *, ranks: int | None) -> tuple[Path, list[SweepRun]]:
    """The folder of a sweep and its runs, each with its recipe checked as at the start of the run.

    The folder is `--metrics.run_dir`, or that of the recipe with -sweep behind its name; a folder of checkpoints
    elsewhere has one of the run's name inside. With Weights & Biases the runs are a group of the folder's name.

    Raises:
        UserError: with every mistake in any of the recipes, or nothing differs.
    """
    recipe_class, found = RECIPES[job], variants(RECIPES[job], arguments)
    try:
        first = load_recipe(recipe_class, found[0].arguments, ranks=ranks)
    except UserError:  # of all that is told below
        first = None
    by_flag = any(word.partition("=")[0] == "--metrics.run_dir" for word in arguments)
    folder = Path("runs") if first is None else first.run_dir
    folder = folder if by_flag else folder.with_name(f"{folder.name}-sweep")
    runs, mistakes = [], {}
    for variant in found:
        command = variant.arguments
        if first is not None:
            command = with_keys(recipe_class, command, _places(variant.name, folder, first))
        try:
            recipe = load_recipe(recipe_class, command, needs_files=True, ranks=ranks)
            on_meta(recipe)
            if isinstance(recipe, GRPORecipe):
                recipe.schedule(ranks=ranks or 1)
            runs.append(SweepRun(variant.name, recipe, [job, *command], ranks))
        except UserError as error:
            for line in error.problems:
                mistakes.setdefault(line, []).append(variant.name)
    if mistakes:
        raise UserError([_of_some(line, names, len(found)) for line, names in mistakes.items()])
    if len(runs) == 1:
        raise UserError("nothing differs: give a key several values, such as --training.seed 0,1,2")
    return folder, runs


def _places(name: str, folder: Path, recipe: TrainingRecipe) -> dict[str, str]:
    """Keys that give a run its own folders, and its group."""
    keys = {"metrics.run_dir": str(folder / name)}
    if recipe.checkpoint.dir != Checkpoint().dir:
        keys["checkpoint.dir"] = f"{recipe.checkpoint.dir.rstrip('/')}/{name}"
    if recipe.metrics.wandb and recipe.metrics.wandb_group is None:
        keys["metrics.wandb_group"] = folder.name
    return keys


def _of_some(line: str, names: Sequence[str], count: int) -> str:
    if len(names) == count:
        return line
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{others}: {line}"


def run_all(runs: Sequence[SweepRun], *, say: Callable[[str], None]) -> dict[str, str]:
    """Do the runs one after another, each in a process of its own; name -> how it ended.

    One that is finished is passed over, one that was interrupted goes on, one that fails does not keep the others from
    starting. A signal goes on to the run that it meets, which stops with a checkpoint; no other is started then.

    Raises:
        SystemExit: a signal asked to stop.
    """
    ends = dict.fromkeys((run.name for run in runs), NOT_STARTED)
    with _Signals() as signals:
        for number, run in enumerate(runs, 1):
            title = f"[{number}/{len(runs)}] {run.name}"
            if run.is_finished():
                ends[run.name] = BEFORE
                say(f"{title}: finished before")
                continue
            say(title)
            code = signals.wait_for(run.process)
            if signals.received is not None:
                say(f"stopped by {signals.received.name}: the same command goes on from there")
                raise SystemExit(128 + signals.received)
            ends[run.name] = DONE if code == 0 else f"{FAILED} with exit code {code}"
            if code:
                log = run.folder / "log.txt"
                say(f"{title}: {ends[run.name]}; what it said last is above{f' and in {log}' if log.exists() else ''}")
    return ends


class _Signals:
    """Gives the signals that ask this process to stop to the process that it waits for."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> "_Signals":
        ours = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._pass_on) for number in ours}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for(self, command: Sequence[str]) -> int:
        """The exit code of a command; 128 + number where a signal ended it, as a shell has it."""
        if self.received is not None:
            return 0
        # In a group of its own: else Ctrl-C would reach it from the terminal too, and torchrun takes two for a kill.
        self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        if self.received is not None:  # it came while the process was being made
            self._child.send_signal(self.received)
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        if self._child is not None:
            self._child.send_signal(number)


def slurm_script(runs: Sequence[SweepRun], *, name: str, made_by: Sequence[str], then: Sequence[str]) -> str:
    """A SLURM array with a task for each run.

    Args:
        name: of the job.
        made_by, then: the command that prints the script, and the one to be given after its jobs.
    """
    cases = [f"{number}) exec srun --ntasks=1 {shlex.join(run.words)} ;;" for number, run in enumerate(runs)]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Runs: {len(runs)}, a task of the array each. Made by",
            f"#   {printable(shlex.join(made_by))} > sweep.sh",
            "# Submit it by `sbatch sweep.sh`, with the environment active that has the project installed. A run that",
            "# was stopped goes on when it is submitted again. When all are done:",
            f"#   {printable(shlex.join(then))}",
            f"#SBATCH --job-name={re.sub(r'[^A-Za-z0-9_.=,+-]+', '-', name)}",
            f"#SBATCH --array=0-{len(runs) - 1}",
            "#SBATCH --nodes=1",
            "#SBATCH --ntasks-per-node=1",
            f"#SBATCH --gpus-per-node={runs[0].ranks or 1}",
            "#SBATCH --cpus-per-task=8",
            "#SBATCH --time=24:00:00",
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "#SBATCH --output=slurm-%A_%a.log",
            "set -euo pipefail",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            "esac",
        ]
    )
