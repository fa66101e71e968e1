"""Does one forward beat two? FID against forwards per image, of ways to train the quickstart's generator.

python benchmarks/learning.py --folder FOLDER [--workers N] [--seconds N] [--only NAME...] [--small]
python benchmarks/learning.py --folder FOLDER --report DATE-NAME        # tables and plots of what is there

Every row gets the same CPU time on one thread (`learning_rows.py` declares them), on three bases and with two seeds.
Settings are chosen by one classifier against the split `validation`, claims are made by another against `test`.

Each finished cell is a line of FOLDER/cells.jsonl, on the disk before the next one is counted; weights lie in
FOLDER/models. Started again, the benchmark does what is missing. After `--seconds` it ends what is not finished.
--only does the cells whose names begin so, and what they need; --small is a rehearsal of everything but the numbers.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

import learning_cells
from grpo.config import EXPORT_NAME
from grpo.environment import environment
from grpo.parallel import distributed
from learning_rows import JUDGES, Cell, Sizes, declare, picture_of

SMALL = Sizes(
    seconds=1.0, images=60, choosing_images=40, bases=(3,), seeds=(0,),
    making={"tokenizer": 4, "pretrain": 4, "classifier": 4}, timing=0.2,
)  # fmt: skip
ROUNDS = 100  # of the bootstrap over drawn images
FIRST_GUESS = 1.5  # wall seconds a CPU second that a cell is expected to take
Results = dict[str, dict[str, Any]]


def main() -> None:
    """Do the cells, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".learning"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--report", metavar="NAME", help="write NAME.json, NAME-*.png and NAME.md into the folder")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    sizes = SMALL if options.small else Sizes()
    cells = declare(sizes)
    store = Store(options.folder, cells)
    if options.report:
        from learning_report import report

        report(options.folder, options.report, store.results, sizes)
        return
    torch.set_num_threads(1)
    Scheduler(store, missing(cells, options.only, store), options).run()


def missing(cells: Mapping[str, Cell], beginnings: list[str], store: "Store") -> list[Cell]:
    """The cells whose names begin so and all that they need, without the finished ones, the most valuable first.

    A training whose weights are not here, because its line came from another machine, is done again where it is needed.
    """
    found: set[str] = set()
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in cells):
            sys.exit(f"benchmarks/learning.py: no cell begins with {beginning}")
    names = [name for name in cells if any(name.startswith(beginning) for beginning in beginnings)]
    names = [name for name in names if name not in store.results]
    while names:
        name = names.pop()
        for need in () if name in found else cells[name].needs:
            if cells[need].kind == "train" and not (store.folder / "models" / need / EXPORT_NAME).exists():
                store.results.pop(need, None)
            names += [] if need in store.results else [need]
        found.add(name)
    return sorted((cells[name] for name in found), key=lambda cell: cell.order)


class Store:
    """The finished cells: FOLDER/cells.jsonl, a line each."""

    def __init__(self, folder: Path, cells: Mapping[str, Cell]) -> None:
        self.folder, self.file, self.cpu = folder, folder / "cells.jsonl", environment()["hardware"]["cpu"]
        for name in ("models", "logs", "grids"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.keys: dict[str, str] = {}
        for name in in_order_of_need(cells):
            of_models = {need: self.keys[need] for need in cells[name].needs if cells[need].kind != "seconds"}
            self.keys[name] = cells[name].key(of_models)
        self.results: Results = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the last one, cut short
                continue
            timed_elsewhere = entry["kind"] == "seconds" and entry["cpu"] != self.cpu
            if self.keys.get(entry["name"]) == entry["key"] and not timed_elsewhere:
                self.results[entry["name"]] = entry["result"]

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Write a finished cell down."""
        entry = {"name": cell.name, "kind": cell.kind, "key": self.keys[cell.name], "cpu": self.cpu}
        entry |= {"date": date.today().isoformat(), "result": result}
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[cell.name] = result


def in_order_of_need(cells: Mapping[str, Cell]) -> list[str]:
    """Names, each after those that it needs."""
    ordered: dict[str, None] = {}

    def visit(name: str) -> None:
        for need in () if name in ordered else cells[name].needs:
            visit(need)
        ordered[name] = None

    for name in cells:
        visit(name)
    return list(ordered)


@dataclass
class Running:
    """A cell in a process of its own."""

    cell: Cell
    process: multiprocessing.Process
    answer: Connection
    started: float


class Scheduler:
    """Does cells in processes of one thread each, the most valuable of those that are ready first."""

    def __init__(self, store: Store, cells: list[Cell], options: argparse.Namespace) -> None:
        self.store, self.waiting, self.workers = store, cells, options.workers
        self.deadline = time.monotonic() + options.seconds
        self.running: list[Running] = []
        self.pace: list[float] = []  # wall seconds a CPU second expected, of finished cells
        self.failed: list[str] = []

    def run(self) -> None:
        """Until all is done or the time is over."""
        started, total = time.monotonic(), len(self.waiting)
        try:
            while self.running or self.waiting:
                self.start_ready()
                left = self.deadline - time.monotonic()
                if not self.running or left <= 0:
                    break
                pipes = [running.answer for running in self.running]
                ready = wait(pipes, timeout=min(left, 3600))
                for running in [running for running in self.running if running.answer in ready]:
                    self.collect(running)
        finally:
            for running in self.running:
                running.process.kill()
                running.process.join()
        names = [running.cell.name for running in self.running]
        seconds = time.monotonic() - started
        print(f"{total - len(self.waiting) - len(names) - len(self.failed)} of {total} cells in {seconds:.0f} s")
        for what, which in (("ended unfinished", names), ("failed", self.failed)):
            if which:
                print(f"{what}: {', '.join(which)}")
        sys.exit(1 if self.failed else 0)

    def start_ready(self) -> None:
        """Fill the free places with cells whose needs are there and that the time is enough for."""
        for cell in list(self.waiting):
            if len(self.running) >= self.workers:
                return
            ready = all(need in self.store.results for need in cell.needs)
            if ready and time.monotonic() + self.expected(cell) < self.deadline:
                self.waiting.remove(cell)
                self.start(cell)

    def start(self, cell: Cell) -> None:
        """In a fork of this process, which has torch loaded and no threads."""
        call, settings = prepare(cell, self.store)
        ours, theirs = multiprocessing.Pipe(duplex=False)
        log = self.store.folder / "logs" / f"{cell.name.replace('/', '-')}.log"
        process = multiprocessing.get_context("fork").Process(target=work, args=(call, settings, theirs, log))
        process.start()
        theirs.close()
        self.running.append(Running(cell, process, ours, time.monotonic()))

    def collect(self, running: Running) -> None:
        """Take what a process has found, or note that it found nothing."""
        self.running.remove(running)
        seconds = time.monotonic() - running.started
        try:
            result = running.answer.recv()
        except EOFError:
            self.failed.append(running.cell.name)
            print(f"{running.cell.name}: failed, see logs", flush=True)
            return
        finally:
            running.process.join()
        self.pace.append(seconds / running.cell.expected_seconds)
        self.store.add(running.cell, result)
        fid = f", FID {result['fid']:.4f}, accuracy {result['accuracy']:.3f}" if "fid" in result else ""
        print(f"{running.cell.name}: {seconds:.0f} s{fid}", flush=True)

    def expected(self, cell: Cell) -> float:
        """Wall seconds that a cell may take."""
        pace = sorted(self.pace)[len(self.pace) // 2] if len(self.pace) > 5 else FIRST_GUESS
        return pace * cell.expected_seconds


def work(call: str, settings: dict[str, Any], answer: Connection, log: Path) -> None:
    """A cell, in a process of its own."""
    with log.open("w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            if call == "look":
                answer.send(learning_cells.look(**settings))
            else:
                with distributed(600) as world:
                    answer.send(getattr(learning_cells, call)(world, **settings))
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None


def prepare(cell: Cell, store: Store) -> tuple[str, dict[str, Any]]:
    """The function of `learning_cells` that does a cell, and its arguments, with what other cells have found."""
    models, found = (store.folder / "models").absolute(), store.results
    settings = dict(cell.settings)
    if cell.kind == "look":
        if (grid := settings.pop("grid", None)) is not None:
            chosen = found[best(grid, found)]
            settings["point"] = (settings.pop("scale", None) or chosen["cfg_scale"], chosen["temperature"])
        settings.setdefault("point", (1.0, 1.0))
        claims = {"rounds": ROUNDS, "grid": picture_of(store.folder, cell.name)} if settings["judge"] == JUDGES else {}
        return "look", {"models": models, **settings, **claims}
    flags = dict(settings["flags"])
    if "candidates" in settings:
        looks, candidates = settings["tuned"], settings["candidates"]
        flags |= candidates[looks.index(best(looks, found)) if looks else 0]
    if (start := settings.get("start")) is not None:
        if not isinstance(start, str):
            start = best(start, found).removeprefix("look/")
        flags["model.checkpoint"] = f"@{start}"
    if (timed := settings.get("timed")) is not None:
        time_left = settings["cpu_seconds"] - found[timed]["cpu_seconds_once"]
        flags["training.steps"] = max(2, round(time_left / found[timed]["cpu_seconds_a_step"]))
    files = {key: models / value[1:] / EXPORT_NAME for key, value in flags.items() if str(value).startswith("@")}
    call = "seconds_a_step" if cell.kind == "seconds" else "train"
    given = {key: settings[key] for key in ("job", "config", "timing") if key in settings}
    return call, {**given, "flags": {**flags, **files}, "folder": models / cell.name}


def best(looks: tuple[str, ...], found: Results) -> str:
    """The look with the lowest FID."""
    return min(looks, key=lambda name: found[name]["fid"])


if __name__ == "__main__":
    main()
