"""What the kernel benchmarks share: timing, peak memory, the device's own rates, results as JSON, a plot.

A benchmark yields `Case`s: sizes, named sides that do the same work, the bytes and FLOP that the work needs at least,
and an error measured on the spot. The side named "ours" is compared with the side named "eager". A side that raises
(no memory, a peer of another version) is written down and loses nothing of the others, and the results are written
after every case. On a GPU they are held against `Target`s.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

from grpo.environment import environment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_GPU = "Measured on a CPU, where ours is the torch reference path; no Triton kernel was timed on a GPU."
FEWEST_REPEATS = 5


@dataclass
class Case:
    """One piece of work and the ways to do it."""

    name: str
    sizes: dict[str, int | float | str]
    sides: dict[str, Callable[[], object]]
    error: Callable[[], dict[str, float]]
    """Measures the largest differences from the fp64 truth, or between sides, by what was compared."""
    bytes: int = 0
    """Memory traffic that no implementation can avoid."""
    flop: int = 0
    """Floating-point operations of the matrix products that no implementation can avoid."""
    output_bytes: int = 0
    """Memory of what a run returns: the peak above it is scratch."""


@dataclass
class Result:
    """What was measured of one case. Sides that failed are in `failed` alone, by what they raised."""

    name: str
    sizes: dict[str, int | float | str]
    error: dict[str, float] = field(default_factory=dict)
    sides: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    speedup: float | None = None
    memory_ratio: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    """Of ours: share of the measured copy bandwidth and matrix rate."""
    output_bytes: int = 0

    def seconds(self, side: str) -> float:
        """Median of a side."""
        return self.sides[side]["seconds"]

    def ratio(self, side: str, other: str = "ours") -> float:
        """How many times the time of `other` a side takes."""
        return self.seconds(side) / self.seconds(other)


@dataclass
class Target:
    """A figure that the project wants to reach on an H200."""

    what: str
    figure: Callable[[dict[str, Result]], float]
    """Of the results by case name; a KeyError says that a case or side is missing."""
    limit: float
    at_most: bool = False
    expected: str = ""
    """What was thought likely before any GPU was there."""

    def held_against(self, results: dict[str, Result]) -> dict[str, str | float | bool | None]:
        """What is wanted, expected and measured; `met` is None where nothing was measured."""
        try:
            figure = self.figure(results)
        except KeyError:
            figure = None
        met = None if figure is None else figure <= self.limit if self.at_most else figure >= self.limit
        wanted = f"{'at most' if self.at_most else 'at least'} {self.limit:.3g}"
        return {"what": self.what, "wanted": wanted, "expected": self.expected, "figure": figure, "met": met}


def main(description: str, cases: Callable[[argparse.Namespace], Iterator[Case]], targets: Sequence[Target]) -> None:
    """The command line of a kernel benchmark: measure `cases(options)` one by one, print and write each.

    The targets are for a GPU: on a CPU the kernels do not run.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results; a plot goes beside it where matplotlib is")
    parser.add_argument("--repeats", type=int, default=100 if DEVICE.type == "cuda" else 7, help="runs of each side")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a case's measured runs, about, at most")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds after which no case is begun")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile's side")
    parser.add_argument("--cases", default="", help="only cases whose name has this regular expression")
    parser.add_argument("--without", nargs="+", default=(), help="sides to leave out")
    options = parser.parse_args()
    torch.manual_seed(0)
    begin, results, left_out = time.monotonic(), [], []
    rates = device_rates()
    print(", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()), flush=True)
    for case in cases(options):
        if not re.search(options.cases, case.name):
            continue
        if time.monotonic() - begin > options.deadline:
            left_out.append(case.name)
            continue
        case.sides = {side: run for side, run in case.sides.items() if side not in options.without}
        results.append(measure(case, rates, repeats=options.repeats, seconds=options.seconds))
        show(results[-1])
        if options.json:
            write(options.json, results, rates, targets, left_out)
    if left_out:
        print(f"left out at the deadline: {', '.join(left_out)}")
    if DEVICE.type == "cuda":
        print(*map(target_line, held(targets, results)), sep="\n", flush=True)
    if not results:
        print(f"no case was measured: the names in --cases are searched for {options.cases!r}")
    elif options.json:
        write(options.json, results, rates, targets, left_out)
        draw(results, options.json.with_suffix(".png"))


def held(targets: Sequence[Target], results: list[Result]) -> list[dict]:
    """All targets beside what was measured."""
    by_name = {result.name: result for result in results}
    return [target.held_against(by_name) for target in targets]


def target_line(target: dict) -> str:
    """One target for the console."""
    word = {True: "pass", False: "MISS", None: "none"}[target["met"]]
    figure = "not measured" if target["figure"] is None else f"{target['figure']:.3g}"
    expected = f", expected {target['expected']}" * bool(target["expected"])
    return f"{word}  {target['what']}: {figure}, wanted {target['wanted']}{expected}"


def measure(case: Case, rates: dict[str, float], *, repeats: int, seconds: float) -> Result:
    """Median seconds and peak memory of every side, the sides in turn so that a slow spell meets all of them.

    Every side runs `repeats` times, or fewer (not below `FEWEST_REPEATS`) where all of it would take more than
    `seconds`.
    """
    result = Result(case.name, case.sizes, output_bytes=case.output_bytes)
    guard = _Guard(result.failed)
    result.error = guard("error", case.error) or {}
    times: dict[str, list[float]] = {}
    for side, run in case.sides.items():
        guard(side, run)  # compiles, warms up
        peak = guard(side, lambda run=run: peak_bytes(run))
        if side not in result.failed:
            times[side], result.sides[side] = [], {"peak_bytes": peak}
    begin = time.monotonic()
    for turn in range(repeats):
        if turn >= FEWEST_REPEATS and time.monotonic() - begin > seconds:
            break
        for side in [side for side in times if side not in result.failed]:
            times[side].append(guard(side, lambda side=side: timed(case.sides[side])))
    for side in list(result.sides):
        if side in result.failed:
            del result.sides[side]
        else:
            median = statistics.median(times[side])
            result.sides[side] |= {"seconds": median, "fastest_seconds": min(times[side]), "repeats": len(times[side])}
    _compare(result, case, rates)
    return result


class _Guard:
    """Calls functions; what one raises is noted under a name, and None returned."""

    def __init__(self, failed: dict[str, str]) -> None:
        self.failed = failed

    def __call__(self, name: str, run: Callable[[], object]) -> object:
        if name in self.failed:
            return None
        try:
            return run()
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0][:200]}"
        if DEVICE.type == "cuda":  # outside the handler, which holds the frames and their tensors
            gc.collect()
            torch.cuda.empty_cache()
        return None


def _compare(result: Result, case: Case, rates: dict[str, float]) -> None:
    """Fills in what needs ours, and ours beside eager."""
    ours, eager = result.sides.get("ours"), result.sides.get("eager")
    if ours and eager:
        result.speedup = eager["seconds"] / ours["seconds"]
        result.memory_ratio = ours["peak_bytes"] / max(eager["peak_bytes"], 1)
    if ours and case.bytes:
        result.shares["copy_bandwidth"] = case.bytes / ours["seconds"] / rates["copy_bytes_per_second"]
    if ours and case.flop:
        result.shares["matrix_rate"] = case.flop / ours["seconds"] / rates["matrix_flop_per_second"]


def launches(run: Callable[[], object]) -> int:
    """Kernels that a run launches on the GPU."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run; on a GPU by events, with a second-level cache that holds nothing of the inputs.

    The GPU sleeps first, some 3 ms, while the host launches the run: the host's time does not count.
    """
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.empty(1 << 28, dtype=torch.int8, device=DEVICE).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(5_000_000)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(run: Callable[[], object]) -> int:
    """Memory that a run takes above what is allocated before it: of the GPU, or of the process (Linux)."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that an earlier run has freed is used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    before = _resident_peak()
    run()
    return _resident_peak() - before


def _resident_peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def device_rates() -> dict[str, float]:
    """What this device reaches on a plain copy and on a plain matrix product, the yardsticks of the shares."""
    elements, size, dtype = (1 << 28, 8192, torch.bfloat16) if DEVICE.type == "cuda" else (1 << 24, 1024, torch.float32)
    source, target = torch.ones(elements, device=DEVICE), torch.empty(elements, device=DEVICE)
    matrix = torch.randn(size, size, device=DEVICE).to(dtype)  # one of ones is faster than any other
    copies, products = (lambda: target.copy_(source)), (lambda: matrix @ matrix)
    copies(), products()
    return {
        "copy_bytes_per_second": 8 * elements / min(timed(copies) for _ in range(5)),
        "matrix_flop_per_second": 2 * size**3 / min(timed(products) for _ in range(5)),
    }


def compiled(run: Callable, options: argparse.Namespace) -> dict[str, Callable]:
    """{"compile": torch.compile of `run`}, or nothing where it was left out."""
    if options.no_compile:
        return {}
    torch._dynamo.config.recompile_limit = 64  # beyond it a shape would run eagerly, and nobody would know
    return {"compile": torch.compile(run, dynamic=False)}


def peers(**functions: Callable[[], Callable]) -> dict[str, Callable]:
    """The peers, on a GPU. Each value imports its peer and returns the function to time.

    A peer that is not installed is a side that fails, so that the results tell why it has no number.
    """
    return {name: _late(make) for name, make in functions.items()} if DEVICE.type == "cuda" else {}


def _late(make: Callable[[], Callable]) -> Callable:
    """The function that `make` returns, made at its first call: an import that fails is then that side's alone."""
    made: list[Callable] = []

    def call(*arguments):
        if not made:
            made.append(make())
        return made[0](*arguments)

    return call


def show(result: Result) -> None:
    """A few lines on the console."""
    print(f"\n{result.name} {result.sizes}")
    for side, numbers in result.sides.items():
        print(f"  {side:20} {numbers['seconds'] * 1e3:10.3f} ms {numbers['peak_bytes'] / 2**20:10.1f} MiB")
    for side, reason in result.failed.items():
        print(f"  {side:20} FAILED {reason}")
    ours = [f"{share:.0%} of {name}" for name, share in result.shares.items()]
    if result.speedup:
        ours.insert(0, f"{result.speedup:.2f}x eager, memory {result.memory_ratio:.2f}x")
    errors = ", ".join(f"{name} {error:.1e}" for name, error in result.error.items())
    print(f"  ours: {', '.join(ours)}; errors: {errors}", flush=True)


def write(
    file: Path, results: list[Result], rates: dict[str, float], targets: Sequence[Target], left_out: list[str]
) -> None:
    """The results as JSON, with hardware, versions and date; speedup and memory_ratio are those of the first case."""
    content = {
        **environment(),
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "note": NO_GPU if DEVICE.type == "cpu" else "",
        "rates": rates,
        "speedup": results[0].speedup,
        "memory_ratio": results[0].memory_ratio,
        "targets": held(targets, results) if DEVICE.type == "cuda" else [],
        "left_out": left_out,
        "sizes": results[0].sizes,
        "sides": results[0].sides,
        "cases": [asdict(result) for result in results],
    }
    write_whole(file, content)


def write_whole(file: Path, content: dict) -> None:
    """JSON that is there as a whole or not at all, so that a benchmark that is killed keeps its finished cases."""
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(file)


def draw(results: list[Result], file: Path) -> None:
    """The plot, where matplotlib is."""
    if importlib.util.find_spec("matplotlib"):
        plot(results, file)
    else:
        print("no plot: matplotlib is not installed", file=sys.stderr)


def plot(results: list[Result], file: Path) -> None:
    """Bars of time and peak memory, one group for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = list(dict.fromkeys(side for result in results for side in result.sides))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1.2 + 0.32 * len(results) * len(sides)), layout="constrained")
    for axis, quantity, unit, label in ((axes[0], "seconds", 1e3, "ms"), (axes[1], "peak_bytes", 2**-20, "MiB")):
        for i, side in enumerate(sides):
            shown = [
                (j, result.sides[side][quantity] * unit) for j, result in enumerate(results) if side in result.sides
            ]
            places = [j + (i - (len(sides) - 1) / 2) * 0.8 / len(sides) for j, _ in shown]
            bars = axis.barh(places, [height for _, height in shown], height=0.75 / len(sides), label=side)
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axis.set(xlabel=label, yticks=range(len(results)), yticklabels=[result.name for result in results])
        axis.invert_yaxis()
        axis.margins(x=0.12)
    axes[0].legend()
    figure.suptitle(" / ".join(environment()["hardware"].values()))
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")
