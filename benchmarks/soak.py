"""Soak: the small GRPO recipe on two ranks for a given time, with random faults, then compared with a quiet run.

python benchmarks/soak.py --minutes 60 --seed 0 --json benchmarks/results/soak.json
python benchmarks/soak.py --minutes 60 --kinds kill_rank --faults 20      # 20 restarts by torchrun alone

The disturbed run gets SIGKILL, SIGSTOP, SIGTERM, damaged checkpoints, hangs, a folder that a rank does not see and full
disks, also at its end, at random moments; torchrun starts
its ranks again, and where the launcher itself has ended, this script starts it with the same command. When the time is
over the run is asked to stop, and a second run of as many steps is done undisturbed. All losses, gradient norms and
rewards of both are then compared as bits, and so are weights and optimizer state. The second run comes on top of the
given time. Nothing here needs special rights, or a GPU.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from grpo.environment import environment
from soak_job import Job, Watch, compare_runs

RECOVERY_SECONDS = 300


@dataclass
class Fault:
    """One fault and what became of it."""

    kind: str
    seconds: float
    """When, since the start of the soak."""
    step: int
    """Last step that was done before the run went back."""
    resumed_at: int | None = None
    """Step of the checkpoint that it went on from; None if it did not within `RECOVERY_SECONDS`."""
    recovery_seconds: float | None = None
    """From the fault to the first step after it."""
    relaunched: bool = False
    """Whether this script had to start torchrun again; else torchrun started the ranks."""

    @property
    def steps_lost(self) -> int | None:
        """Steps that had to be done again."""
        return None if self.resumed_at is None else max(0, self.step - self.resumed_at)


class Soak:
    """The disturbed run and what is done to it."""

    def __init__(self, job: Job, options: argparse.Namespace) -> None:
        self.job, self.options = job, options
        self.random = random.Random(options.seed)
        self.faults: list[Fault] = []
        self.lost_ends = 0
        self._bag: list[str] = []
        self.begun = time.monotonic()

    def run(self) -> None:
        """Faults until the time is over or there were enough of them."""
        deadline = self.begun + 60 * self.options.minutes
        self.job.launch()
        self.job.wait_for_checkpoint(seconds=RECOVERY_SECONDS)
        while time.monotonic() < deadline and len(self.faults) < self.options.faults:
            time.sleep(min(self.random.uniform(0, 2 * self.options.gap), max(0.0, deadline - time.monotonic())))
            if time.monotonic() < deadline:
                self.disturb(self._next_kind())
        self.job.stop()

    def _next_kind(self) -> str:
        """Kinds in random order, each as often as the others."""
        if not self._bag:
            self._bag = self.random.sample(self.options.kinds, len(self.options.kinds))
        return self._bag.pop()

    def disturb(self, kind: str) -> None:
        """Do one fault and wait until the run goes on."""
        starts, step = len(self.job.starts()), self.job.step()
        fault = Fault(kind, round(time.monotonic() - self.begun, 1), step)
        self.faults.append(fault)
        begun = time.monotonic()
        getattr(self, kind)()
        if kind == "full_disk_at_end":  # which has made starts of its own
            starts, step = len(self.job.starts()), self.job.step()
        if self.options.early and self.random.random() < self.options.early:
            self.job.wait_for_new_ranks(seconds=60)
            time.sleep(self.random.uniform(0, 5))
            starts, step = len(self.job.starts()), max(step, self.job.step())
            self.job.kill_rank(self.random)
            fault.kind = f"{kind}, then kill_rank while starting"
        progress = self.job.wait_for_progress(after_starts=starts, seconds=RECOVERY_SECONDS)
        fault.relaunched = progress.relaunched
        if progress.first_step is None:
            print(f"{fault.seconds:7.0f} s  {fault.kind}: NO RECOVERY within {RECOVERY_SECONDS} s", flush=True)
            self.job.stop()
            self.job.launch()
            self.job.wait_for_progress(after_starts=len(self.job.starts()), seconds=RECOVERY_SECONDS)
            return
        fault.step = max(step, progress.highest_step_before)
        fault.resumed_at = progress.first_step
        fault.recovery_seconds = round(time.monotonic() - begun, 1)
        print(f"{fault.seconds:7.0f} s  {fault.kind}: step {fault.step}, went on from {fault.resumed_at} "
              f"after {fault.recovery_seconds:.0f} s", flush=True)  # fmt: skip

    def kill_rank(self) -> None:
        self.job.kill_rank(self.random)

    def kill_in_save(self) -> None:
        """While a checkpoint is being written."""
        self.job.wait_for_partial(seconds=60)
        self.job.kill_rank(self.random)

    def kill_data_worker(self) -> None:
        self.job.kill_data_worker(self.random)

    def stop_rank(self) -> None:
        """A rank that hangs: its partner gives up after parallel.timeout."""
        self.job.freeze_rank(self.random)

    def terminate(self) -> None:
        self.job.terminate()

    def kill_launcher(self) -> None:
        self.job.kill_launcher()

    def corrupt(self) -> None:
        """Damage the newest checkpoint, then make the run look for one."""
        self.job.corrupt_newest(self.random)
        self.job.kill_rank(self.random)

    def full_disk(self) -> None:
        """No file of the run may grow any more, until its ranks have been started again."""
        self.job.limit_file_size(self.random)

    def hang(self) -> None:
        """All ranks hang in their own work, so that no collective notices: each one's watchdog ends it."""
        with self.job.open_door("hang"):
            self.job.wait_for_new_ranks(seconds=120)

    def no_mount(self) -> None:
        """After a restart one rank sees no checkpoints: the start ends and touches nothing; then it sees them again."""
        with self.job.open_door("no-mount-1"):
            self.job.kill_rank(self.random)
            self.job.wait_for_output("do not see the same folder", seconds=120)

    def requeue(self) -> None:
        """The machines go away, and a queue starts the same command again elsewhere."""
        self.job.kill_everything()

    def full_disk_at_end(self) -> None:
        """The run comes to its end while no file may grow; the last checkpoint must be there when torchrun is done."""
        self.job.stop()
        last, starts = self.job.checkpoint_step() + self.random.randint(1, 15), len(self.job.starts())
        with self.job.open_door("hang"):  # so that the limit is there before the end
            self.job.launch(steps=last)
            self.job.wait_for_start(after_starts=starts, seconds=RECOVERY_SECONDS)
            self.job.limit_file_size(self.random)
        if self.job.wait_for_end(seconds=RECOVERY_SECONDS) != 0 or self.job.checkpoint_step() != last:
            print(f"the run up to step {last} has ended without its last checkpoint", flush=True)
            self.lost_ends += 1


KINDS = ("kill_rank", "kill_in_save", "kill_data_worker", "stop_rank", "terminate", "kill_launcher", "corrupt",
         "full_disk", "hang", "no_mount", "requeue", "full_disk_at_end")  # fmt: skip


def main() -> None:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=options.folder))
    soak = Soak(Job(folder / "disturbed", seed=options.seed, interval=options.interval), options)
    with Watch(soak.job) as watch:
        soak.run()
    disturbed = {"faults": [asdict(fault) | {"steps_lost": fault.steps_lost} for fault in soak.faults]}
    disturbed |= _summary(soak) | {"resources": watch.summary()}
    steps = soak.job.checkpoint_step()
    print(f"{len(soak.faults)} faults, {steps} steps; now {steps} steps undisturbed", flush=True)
    quiet = Job(folder / "quiet", seed=options.seed, interval=options.interval, steps=steps)
    with Watch(quiet) as watch:
        quiet_seconds = quiet.run_to_end()
    comparison = compare_runs(soak.job, quiet, steps)
    result = {
        **environment(),
        "date": date.today().isoformat(),
        "minutes": options.minutes,
        "seed": options.seed,
        "checkpoint_interval": options.interval,
        "steps": steps,
        **disturbed,
        "quiet": {"seconds": round(quiet_seconds, 1), "resources": watch.summary()},
        "equal": comparison,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "faults"}, indent=1))
    good = all(comparison.values()) and result["not_recovered"] == soak.lost_ends == 0
    if good and not options.keep:
        shutil.rmtree(folder)
    else:
        print(f"the runs are in {folder}")
    sys.exit(0 if good else 1)


def _summary(soak: Soak) -> dict[str, object]:
    recovered = [fault for fault in soak.faults if fault.resumed_at is not None]
    lost = [fault.steps_lost for fault in recovered]
    seconds = [fault.recovery_seconds for fault in recovered]
    return {
        "faults_by_kind": dict(Counter(fault.kind for fault in soak.faults)),
        "starts": len(soak.job.starts()),
        "launches": soak.job.launches,
        "restarted_by_torchrun_alone": sum(not fault.relaunched for fault in recovered),
        "not_recovered": len(soak.faults) - len(recovered),
        "ends_without_last_checkpoint": soak.lost_ends,
        "steps_lost": {"total": sum(lost), "most": max(lost, default=0)},
        "steps_lost_after_sigterm": sum(fault.steps_lost for fault in recovered if fault.kind == "terminate"),
        "recovery_seconds": {
            "median": statistics.median(seconds) if seconds else None,
            "most": max(seconds, default=None),
        },
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="time under faults")
    parser.add_argument("--faults", type=int, default=10**9, help="stop after this many, if the time is not over")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of faults")
    parser.add_argument("--gap", type=float, default=10, help="mean seconds of training between faults")
    parser.add_argument("--early", type=float, default=0.15, help="share of restarts that are themselves disturbed")
    parser.add_argument("--interval", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the faults")
    parser.add_argument("--folder", type=Path, help="where the runs go; by default the system's temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the runs also when all is well")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
