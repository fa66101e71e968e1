"""recipes/train_grpo.py that harms itself at the moments of a plan, and notes what it draws. Run by torchrun, or alone.

    disturbed_recipe.py PLAN.json --config train_configs/debug.toml ...

The plan is {"trace": folder or null, "faults": [...]}; see `Fault`. The recipe itself is the production code: this
script replaces pieces of it in its own process.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo.checkpoint import folders, writing
from grpo.config import GRPORecipe
from grpo.jobs import train_grpo
from grpo.parallel import run_main
from grpo.parallel.distributed import environment_rank
from grpo.training import TrainingRun


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once."""

    do: str
    """kill, hang, stop: this rank; kill_worker: its data worker; terminate: SIGTERM to it; terminate_launcher,
    interrupt_launcher, kill_launcher: torchrun; not_a_number: its loss."""
    at: str
    """rollout: before it; update: after its backward; share: after this rank's files of a checkpoint are written;
    publish: before the finished checkpoint is renamed."""
    step: int
    rank: int = 0
    start: int = 0
    """How often torchrun has restarted the ranks before."""
    after: str | None = None
    """Wait first until this checkpoint exists, e.g. step-000003."""

    def happen(self, checkpoint_dir: Path) -> None:
        deadline = time.monotonic() + 60
        while self.after and not (checkpoint_dir / self.after).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.do == "hang":
            time.sleep(100_000)
        elif self.do == "kill_worker":
            multiprocessing.active_children()[0].kill()
        else:
            numbers = {"kill": signal.SIGKILL, "kill_launcher": signal.SIGKILL, "stop": signal.SIGSTOP,
                       "interrupt_launcher": signal.SIGINT}  # fmt: skip
            target = os.getppid() if self.do.endswith("_launcher") else os.getpid()
            os.kill(target, numbers.get(self.do, signal.SIGTERM))
            time.sleep(3 if self.do.endswith("_launcher") else 0)  # for it to arrive before this step is over


def main(arguments: Sequence[str]) -> None:
    """Read the plan, put its faults in place, run the recipe."""
    plan = json.loads(Path(arguments[0]).read_text())
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    faults = [Fault(**fault) for fault in plan["faults"]]
    faults = [fault for fault in faults if (fault.rank, fault.start) == (environment_rank(), start)]
    trace = Path(plan["trace"]) / f"rank-{environment_rank()}.jsonl" if plan["trace"] else None
    build = train_grpo.build

    def disturbed_build(recipe: GRPORecipe, run: TrainingRun) -> train_grpo.Job:
        return disturb(build(recipe, run), Path(recipe.checkpoint_dir), faults, trace)

    train_grpo.build = disturbed_build
    train_grpo.main(arguments[1:])


def disturb(job: train_grpo.Job, checkpoint_dir: Path, faults: list[Fault], trace: Path | None) -> train_grpo.Job:
    """The job with its faults in place."""
    optimizer = job.update.optimizer

    def due(place: str, number: int) -> None:
        for fault in faults:
            if (fault.at, fault.step) == (place, number):
                fault.happen(checkpoint_dir)

    def rollout(batch: object) -> object:
        due("rollout", optimizer.steps + 1)
        trajectory = job.rollout(batch)
        if trace is not None:
            note(trace, optimizer.steps + 1, batch, trajectory)
        return trajectory

    backward = optimizer.backward

    def disturbed_backward(loss: torch.Tensor) -> None:
        nan = any((f.do, f.step) == ("not_a_number", optimizer.steps + 1) for f in faults)
        backward(loss + torch.nan if nan else loss)
        if not nan:
            due("update", optimizer.steps + 1)

    optimizer.backward = disturbed_backward
    writing.file_sums = before(writing.file_sums, lambda files: due("share", _step_of(list(files))))
    folders.publish = before(folders.publish, lambda partial, final: due("publish", folders.step_of(final)))
    return job._replace(rollout=rollout)


def before(function: Callable, first: Callable) -> Callable:
    """The function with something done before it."""

    def both(*arguments: object) -> object:
        first(*arguments)
        return function(*arguments)

    return both


def note(trace: Path, step: int, batch: object, trajectory: object) -> None:
    """Write down which images were taken and what was drawn for each: {sample: [place in the data set, tokens]}."""
    groups = trajectory.tokens.view(batch.rows, -1)
    drawn = {
        str(int(sample)): [int(index), hashlib.sha256(tokens.numpy().tobytes()).hexdigest()]
        for sample, index, tokens in zip(batch.sample_ids, batch.indices, groups, strict=True)
    }
    with trace.open("a") as file:
        file.write(json.dumps({"step": step, "drawn": drawn}) + "\n")


def _step_of(files: list[Path]) -> int:
    """The step of the checkpoint whose shares are being summed; 0 for other files."""
    if not any(path.name.startswith("shard-") for path in files):
        return 0
    return int(files[0].parent.name.removeprefix(".step-").removesuffix(".partial"))


if __name__ == "__main__":
    assert sys.argv[1:], "a plan"
    run_main(main)
