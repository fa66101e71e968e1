"""The text quickstart with several seeds and settings at once, a process of one thread each: does GRPO help, and where?

PYTHONPATH=. python benchmarks/text_seeds.py --folder FOLDER [--seeds 0,1,2] [--workers N] [--seconds N] [--small]
    [--images N] [--vary "NAME PHASE.SECTION.KEY=VALUE ..."]...

Every seed has a tokenizer, a reader, a generator, guidance-free training of it, and evaluations of the base as it is
and with tuned guidance and of what guidance-free training made of it; then GRPO and its evaluation, once with the
recipe as it is (`default`) and once for each --vary, such as --vary "faster grpo.optimizer.lr=4e-4". A variant that
changes another phase has bases of its own.

What is finished is kept in FOLDER: started again, the benchmark does what is missing. FOLDER/text_seeds.json is
written whenever a row is there: all rows, and means over seeds with the differences between rows of one seed. After
--seconds what still runs is ended. --small is a rehearsal of everything but the numbers. No GPU is used unless --gpu.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from grpo.environment import environment

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "default"
SMALL = {
    "tokenizer": {"training.steps": 60, "training.batch_size": 8, "tokenizer_loss.unquantised_steps": 2},
    "reader": {"training.steps": 10, "training.batch_size": 8},
    "pretrain": {"training.steps": 10, "training.batch_size": 8},
    "gft": {"training.steps": 10, "training.batch_size": 8},
    "grpo": {"training.steps": 2, "rollout.batch_size": 2, "rollout.num_generations": 4, "training.batch_size": 8},
    "evaluate": {"evaluation.num_images": 56, "evaluation.num_reference_images": 56},
}
KEPT = {"checkpoint.interval": 100, "checkpoint.keep_last": 1}  # of the long phases, so that they can go on
RETRIES = 2


@dataclass(frozen=True)
class Variant:
    """Changed keys, by phase."""

    name: str
    changes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Variant":
        name, *settings = text.split()
        changes: dict[str, dict[str, str]] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            phase, dot, key = key.partition(".")
            if not (equals and dot):
                raise SystemExit(f"--vary {setting}: write PHASE.SECTION.KEY=VALUE")
            changes.setdefault(phase, {})[key] = value
        return cls(name, changes)

    @property
    def base(self) -> str:
        """The variant whose tokenizer and generator it starts from."""
        return self.name if self.changes.keys() - {"grpo"} else DEFAULT


def main() -> None:
    """Start what is missing, or, as a process that was started so, do one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".text_seeds"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--images", type=int, help="samples of a row, in place of the recipe's 1,400")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--part", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--base-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    variants = [Variant(DEFAULT), *map(Variant.parse, options.vary)]
    if options.part:
        name, seed = options.part
        do_part(next(variant for variant in variants if variant.name == name), int(seed), options)
        return
    Scheduler(variants, [int(seed) for seed in options.seeds.split(",")], options).run()


def do_part(variant: Variant, seed: int, options: argparse.Namespace) -> None:
    """The phases of one seed and variant, those of its base first; finished ones are passed over."""
    import torch

    from grpo.config import EvaluateRecipe, GRPORecipe
    from grpo.jobs import _quickstart_shapes as story
    from grpo.jobs.quickstart import phase
    from grpo.parallel import distributed
    from grpo.training import run_phases

    torch.set_num_threads(1)
    base_changes = {key: values for key, values in variant.changes.items() if key != "grpo"}

    def make(name: str, *arguments: Any, settings: Mapping[str, object] | None = None, **others: Any) -> Any:
        kind = "evaluate" if name.startswith("evaluate") else "grpo" if name.startswith("grpo") else name
        changed: dict[str, object] = {**(settings or {})}
        changed |= KEPT if kind in ("pretrain", "grpo") else {}
        changed |= {"evaluation.num_images": options.images} if options.images and kind == "evaluate" else {}
        changed |= (SMALL[kind] if options.small else {}) | base_changes.get(kind, {})
        changed |= variant.changes.get("grpo", {}) if kind == "grpo" else {}
        return phase(
            run_dir(options.folder, variant, seed), story.CONFIGS, name, *arguments, settings=changed, **others
        )

    plan = story.plan(argparse.Namespace(recipe="text", seed=seed), make)
    phases = [one for one in plan if one.folder.name not in ("grpo", "evaluate_grpo")]
    if not options.base_only:
        improved, inputs = f"grpo_{variant.name}", {"tokenizer.checkpoint": "tokenizer"}
        start, seeds = {**inputs, "model.checkpoint": "gft"}, {"training.seed": seed}
        after = {**inputs, "model.checkpoint": improved, "evaluation.reader_checkpoint": "reader"}
        phases += [
            make(improved, "GRPO", GRPORecipe, story.train_policy, inputs=start, settings=seeds, config="grpo"),
            make(f"evaluate_{improved}", "after GRPO", EvaluateRecipe, story.evaluate, inputs=after),
        ]
    with distributed(600) as world:
        run_phases(phases, world, say=partial(print, flush=True))


def run_dir(folder: Path, variant: Variant, seed: int) -> Path:
    """Where a seed's phases are, absolute."""
    return (folder / f"{variant.base}-{seed}").resolve()


class Scheduler:
    """Starts a process for each part as soon as its base is there; never more than `workers` at once."""

    def __init__(self, variants: Sequence[Variant], seeds: Sequence[int], options: argparse.Namespace) -> None:
        self.variants, self.seeds, self.options = variants, seeds, options
        bases = {variant.base: variant for variant in reversed(variants) if variant.base == variant.name}
        self.waiting = [(variant, seed, True) for seed in seeds for variant in bases.values()]
        self.waiting += [(variant, seed, False) for variant in variants for seed in seeds]
        self.running: dict[subprocess.Popen, tuple[Variant, int, bool]] = {}
        self.failures: dict[tuple[str, int, bool], int] = {}

    def run(self) -> None:
        """Until all is done, or time is up."""
        self.options.folder.mkdir(parents=True, exist_ok=True)
        ends = time.monotonic() + self.options.seconds
        try:
            while (self.waiting or self.running) and time.monotonic() < ends:
                for part in [part for part in self.waiting if self._is_ready(part)]:
                    if len(self.running) < self.options.workers:
                        self._start(part)
                self._collect()
                time.sleep(0.2)
        finally:
            for process in self.running:
                process.terminate()
            for process in self.running:
                process.wait()
        write_results(self.options.folder, self.variants, self.seeds)
        left = len(self.waiting) + len(self.running)
        print(f"{left} parts are left" if left else "all parts are done", flush=True)

    def _is_ready(self, part: tuple[Variant, int, bool]) -> bool:
        variant, seed, is_base = part
        busy = [*self.waiting, *self.running.values()]
        return is_base or not any(other and v.name == variant.base and s == seed for v, s, other in busy)

    def _start(self, part: tuple[Variant, int, bool]) -> None:
        variant, seed, is_base = part
        self.waiting.remove(part)
        name = f"{variant.name}-{seed}" + ("-base" if is_base else "")
        arguments = ["--folder", str(self.options.folder), "--part", variant.name, str(seed)]
        arguments += [text for vary in self.options.vary for text in ("--vary", vary)]
        arguments += ["--images", str(self.options.images)] * bool(self.options.images)
        arguments += ["--base-only"] * is_base + ["--small"] * self.options.small
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        if not self.options.gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (self.options.folder / f"{name}.log").open("a") as log:
            command = [sys.executable, __file__, *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.running[process] = part
        print(f"{name}: started", flush=True)

    def _collect(self) -> None:
        for process in [process for process in self.running if process.poll() is not None]:
            variant, seed, is_base = part = self.running.pop(process)
            print(f"{variant.name}, seed {seed}: {'done' if process.returncode == 0 else 'failed'}", flush=True)
            key = (variant.name, seed, is_base)
            if process.returncode:
                self.failures[key] = self.failures.get(key, 0) + 1
                if self.failures[key] <= RETRIES:
                    self.waiting.append(part)
                else:
                    print(f"given up; see {self.options.folder}/{variant.name}-{seed}*.log", flush=True)
                    self.waiting = [
                        (v, s, b) for v, s, b in self.waiting if not (is_base and v.base == variant.name and s == seed)
                    ]
            write_results(self.options.folder, self.variants, self.seeds)


def rows(folder: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every finished row: variant, seed, name, and what its evaluation found."""
    for variant in variants:
        names = {name: f"evaluate_{name}" for name in ("base", "guided", "gft")}
        names["grpo"] = f"evaluate_grpo_{variant.name}"
        for seed in seeds:
            for name, phase in names.items():
                path = run_dir(folder, variant, seed) / phase / "result.json"
                if path.exists():
                    yield {"variant": variant.name, "seed": seed, "name": name, **json.loads(path.read_text())}


def summary(found: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """By variant: means over seeds of each row, and GRPO minus each rival, paired by seed, with its standard error."""
    result: dict[str, Any] = {}
    for variant in dict.fromkeys(row["variant"] for row in found):
        table = {(row["name"], row["seed"]): row for row in found if row["variant"] == variant}
        entry: dict[str, Any] = {}
        for metric in metrics:
            values = {
                name: [row[metric] for (kind, _), row in table.items() if kind == name]
                for name in ("base", "guided", "gft", "grpo")
            }
            entry[metric] = {name: statistics.mean(numbers) for name, numbers in values.items() if numbers}
            for rival in ("base", "guided", "gft"):
                pairs = [
                    table["grpo", seed][metric] - table[rival, seed][metric]
                    for seed in sorted({seed for _, seed in table})
                    if ("grpo", seed) in table and (rival, seed) in table
                ]
                if pairs:
                    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None
                    entry[metric][f"grpo - {rival}"] = {
                        "mean": statistics.mean(pairs), "standard_error": error, "of_seeds": pairs,
                    }  # fmt: skip
        result[variant] = entry
    return result


def write_results(folder: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """text_seeds.json, complete or not at all."""
    found = list(rows(folder, variants, seeds))
    content = {
        **environment(),
        "date": date.today().isoformat(),
        "variants": {variant.name: variant.changes for variant in variants},
        "summary": summary(found, ("seen/all", "unseen/all", "fit/seen/all", "fit/unseen/all", "fid")),
        "rows": found,
    }
    path = folder / "text_seeds.json"
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(content, indent=1) + "\n")
    partial_path.replace(path)


if __name__ == "__main__":
    main()
