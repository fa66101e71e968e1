"""A run under torchrun as the outside world sees it: its processes, its folder, and ways to harm both."""

import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, Self

import torch

from grpo.formats import read_tensors
from grpo.observe import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "benchmarks/soak_recipe.py"
RANKS = 2
COMPARED = ("loss", "grad_norm", "reward_mean", "reward_std", "entropy", "surrogate")


class Progress(NamedTuple):
    """How a run went on after a fault."""

    first_step: int | None
    """Step of the checkpoint that the successful start went on from; None if there was no success."""
    highest_step_before: int
    """Last step that the starts before had done."""
    relaunched: bool


class Job:
    """The debugging recipe on two ranks.

    Args:
        run_dir: its folder.
        seed: of the run.
        interval: steps between checkpoints.
        steps: of the run; by default more than it can ever do.
    """

    def __init__(self, run_dir: Path, *, seed: int, interval: int, steps: int = 1_000_000) -> None:
        self.run_dir, self.checkpoints, self.doors = run_dir, run_dir / "checkpoints", run_dir.with_suffix(".doors")
        self.launches = self.requeues = 0
        self._process: subprocess.Popen | None = None
        flags = {"metrics.run_dir": run_dir, "training.steps": steps, "training.seed": seed, "data.num_workers": 1,
                 "checkpoint.interval": interval, "checkpoint.keep_last": 3, "parallel.timeout": 20,
                 "metrics.image_interval": 0, "metrics.interval": 100, "objective.kl": "k3"}  # fmt: skip
        self._command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}",
                         "--max-restarts=100000", SCRIPT, "--config", "debug"]  # fmt: skip
        self._command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def launch(self, *, steps: int | None = None) -> None:
        """Start torchrun, on request only up to a step; what it prints goes to a file beside the run's folder."""
        self.launches += 1
        self.doors.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOAK_DOORS": str(self.doors)}
        if self.requeues:
            environment["SLURM_RESTART_COUNT"] = str(self.requeues)
        command = list(self._command)
        if steps is not None:
            command[command.index("--training.steps") + 1] = str(steps)
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        threading.Thread(target=self._copy_output, args=(self._process.stdout,), daemon=True).start()

    def _copy_output(self, output: IO[bytes]) -> None:
        """Through a pipe, so that a limit on the length of the ranks' files does not silence them."""
        with self.run_dir.with_suffix(".output.txt").open("ab") as file:
            for line in output:
                file.write(line)
                file.flush()

    def run_to_end(self) -> float:
        """Start it and wait; the seconds that it took."""
        begun = time.monotonic()
        self.launch()
        code = self._process.wait()
        assert code == 0, f"the undisturbed run ended with {code}: see {self.run_dir.with_suffix('.output.txt')}"
        return time.monotonic() - begun

    def stop(self) -> None:
        """Ask it to stop and wait until it has."""
        self._process.terminate()
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def starts(self) -> list[int]:
        """The step from which each start of the ranks so far has gone on; what was before the first checkpoint lies
        aside."""
        logs = sorted((self.run_dir / "previous").glob("*/log.txt"), key=lambda path: int(path.parent.name))
        text = "".join(path.read_text() for path in (*logs, self.run_dir / "log.txt") if path.exists())
        return [int(step) for step in re.findall(r": from step (\d+) to", text)]

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            with (self.run_dir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                steps = re.findall(rb'^{"step": (\d+), .*}\n', file.read(), re.MULTILINE)
        except OSError:
            return 0
        return int(steps[-1]) if steps else 0

    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(path.name[5:]) for path in self.checkpoints.glob("step-*[0-9]")), default=0)

    def wait_for_progress(self, *, after_starts: int, seconds: float) -> Progress:
        """Wait for a step of a start that is not among the first `after_starts`; launches where that is needed."""
        deadline, highest, relaunched = time.monotonic() + seconds, self.step(), False
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self.launch()
                relaunched = True
            starts, step = self.starts(), self.step()  # a start cuts metrics.jsonl before it writes its line
            if len(starts) == after_starts:
                highest = max(highest, step)
            elif step > starts[-1]:
                return Progress(starts[-1], highest, relaunched)
            time.sleep(0.1)
        return Progress(None, highest, relaunched)

    def wait_for_start(self, *, after_starts: int, seconds: float) -> None:
        """Wait until the ranks have begun to train once more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(self.starts()) <= after_starts:
            time.sleep(0.05)

    def wait_for_checkpoint(self, *, seconds: float) -> None:
        """Wait until there is one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.checkpoint_step():
            time.sleep(0.1)

    def wait_for_new_ranks(self, *, seconds: float) -> None:
        """Wait until all ranks are other processes than now, or the launcher has ended."""
        before, deadline = set(self.ranks()), time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            now = set(self.ranks())
            if len(now) == RANKS and not now & before:
                return
            time.sleep(0.05)

    def wait_for_partial(self, *, seconds: float) -> None:
        """Wait until a checkpoint is being written."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not any(self.checkpoints.glob(".step-*.partial")):
            time.sleep(0.002)

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        return [pid for pid in children(self._process.pid) if _is_rank(pid)] if self._process is not None else []

    def kill_rank(self, chance: random.Random) -> None:
        _send(chance, self.ranks(), signal.SIGKILL)

    def freeze_rank(self, chance: random.Random) -> None:
        _send(chance, self.ranks(), signal.SIGSTOP)

    def kill_data_worker(self, chance: random.Random) -> None:
        _send(chance, [worker for rank in self.ranks() for worker in children(rank)], signal.SIGKILL)

    def terminate(self) -> None:
        self._process.terminate()
        self._wait_for_launcher()

    def kill_launcher(self) -> None:
        self._process.kill()
        self._wait_for_launcher()

    def _wait_for_launcher(self) -> None:
        self._process.wait(120)

    def kill_everything(self) -> None:
        """As if the machines were gone: the launcher and its ranks end at once, and a queue starts the run again."""
        for process in (self._process.pid, *self.ranks()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._wait_for_launcher()
        self.requeues += 1

    @contextmanager
    def open_door(self, name: str) -> Iterator[None]:
        """Let `soak_recipe.py` do what the door is for, for the duration of the block."""
        (self.doors / name).touch()
        try:
            yield
        finally:
            (self.doors / name).unlink()

    def wait_for_output(self, text: str, *, seconds: float) -> None:
        """Wait until the launcher or a rank has said something that it had not said before."""
        output, deadline = self.run_dir.with_suffix(".output.txt"), time.monotonic() + seconds
        before = output.stat().st_size
        while time.monotonic() < deadline:
            with output.open("rb") as file:
                file.seek(before)
                if text.encode() in file.read():
                    return
            time.sleep(0.1)

    def wait_for_end(self, *, seconds: float) -> int | None:
        """The launcher's exit code, None if it does not end."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def corrupt_newest(self, chance: random.Random) -> None:
        """Flip a bit of a random file of the newest checkpoint, cut it short, or remove it."""
        newest = self.checkpoints / f"step-{self.checkpoint_step():06d}"
        files = sorted(path for path in newest.glob("*") if path.stat().st_size)
        if not files:
            return
        path = chance.choice(files)
        harm = chance.choice(("flip", "cut", "remove"))
        if harm == "remove":
            path.unlink()
            return
        contents = bytearray(path.read_bytes())
        if harm == "cut":
            path.write_bytes(contents[: len(contents) // 2])
        else:
            contents[chance.randrange(len(contents))] ^= 1 << chance.randrange(8)
            path.write_bytes(contents)

    def limit_file_size(self, chance: random.Random) -> None:
        """From now on the ranks cannot write beyond some length of any file, as if the disk were full.

        The length lies between nothing and the largest file of a checkpoint, so that the first to fail may be a shard,
        the consolidated weights or metrics.jsonl.
        """
        largest = max((path.stat().st_size for path in self.checkpoints.glob("step-*/*")), default=100_000)
        for rank in self.ranks():
            try:
                resource.prlimit(rank, resource.RLIMIT_FSIZE, (chance.randrange(largest), resource.RLIM_INFINITY))
            except (ProcessLookupError, PermissionError):
                continue


class Watch:
    """Memory and file descriptors of a job's ranks while it runs, looked at every two seconds."""

    SECONDS = 2.0
    WARM_UP = 30.0
    """Seconds of each process that do not count: it is still growing into its work."""

    def __init__(self, job: Job) -> None:
        self._job, self._over = job, threading.Event()
        self._seen: dict[int, list[tuple[float, float, int]]] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def summary(self) -> dict[str, float | int | None]:
        """Growth, by least squares, of the processes that lived for a minute beyond the warm-up; highest values."""
        growth, descriptors, minutes = [], [], 0.0
        for samples in self._seen.values():
            warm = [sample for sample in samples if sample[0] > samples[0][0] + self.WARM_UP]
            if len(warm) > 2 and warm[-1][0] - warm[0][0] >= 60:
                hours, mib, files = ([sample[i] for sample in warm] for i in range(3))
                growth.append(statistics.linear_regression([h / 3600 for h in hours], mib).slope)
                descriptors.append(statistics.linear_regression([h / 3600 for h in hours], files).slope)
                minutes += (warm[-1][0] - warm[0][0]) / 60
        return {
            "processes": len(self._seen),
            "processes_measured": len(growth),
            "minutes_measured": round(minutes, 1),
            "memory_growth_mib_per_hour_median": round(statistics.median(growth), 2) if growth else None,
            "memory_growth_mib_per_hour_most": round(max(growth), 2) if growth else None,
            "memory_mib_most": round(max((s[1] for samples in self._seen.values() for s in samples), default=0)),
            "descriptor_growth_per_hour_median": round(statistics.median(descriptors), 2) if descriptors else None,
            "descriptors_most": max((s[2] for samples in self._seen.values() for s in samples), default=0),
        }

    def _look(self) -> None:
        while not self._over.wait(self.SECONDS):
            for rank in self._job.ranks():
                try:
                    pages = int(Path(f"/proc/{rank}/statm").read_text().split()[1])
                    files = len(os.listdir(f"/proc/{rank}/fd"))
                except (OSError, IndexError):
                    continue
                memory = pages * resource.getpagesize() / 2**20
                self._seen.setdefault(rank, []).append((time.monotonic(), memory, files))


def compare_runs(first: Job, second: Job, steps: int) -> dict[str, bool]:
    """Whether two runs are the same, bit for bit, up to a step at which both have a checkpoint."""
    lines = [
        [
            {name: _hex(line[name]) for name in ("step", *COMPARED)}
            for line in read_metrics(job.run_dir / "metrics.jsonl")
        ]
        for job in (first, second)
    ]
    folders = [job.checkpoints / f"step-{steps:06d}" for job in (first, second)]
    states = [read_tensors(folder) for folder in folders]
    files = [torch.load(folder / "consolidated.pth", weights_only=True)["model"] for folder in folders]
    positions = [json.loads((folder / "run_state.json").read_text())["run"]["stream"] for folder in folders]
    return {
        "every_step_once": [line["step"] for line in lines[0][:steps]] == [_hex(step + 1) for step in range(steps)],
        "metrics": len(lines[1]) == steps and lines[0][:steps] == lines[1],
        "weights_and_optimizer": _same(*states),
        "consolidated_weights": _same(*files),
        "data_position": positions[0] == positions[1],
    }


def children(pid: int) -> list[int]:
    """Child processes of a process that have not ended."""
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return sorted(int(child) for task in tasks for child in task.split())


def _is_rank(pid: int) -> bool:
    try:
        return SCRIPT.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _send(chance: random.Random, processes: list[int], number: signal.Signals) -> None:
    if processes:
        try:
            os.kill(chance.choice(processes), number)
        except ProcessLookupError:
            return


def _hex(value: float | None) -> str | None:
    return None if value is None else float(value).hex()


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
