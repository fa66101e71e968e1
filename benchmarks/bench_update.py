"""Sampling and update of one teacher-forced GRPO step: ours against the reference algorithm.

python benchmarks/bench_update.py                       # CPU, small: about five minutes on two cores
python benchmarks/bench_update.py --json out.json --sweep     # and ten more
python benchmarks/bench_update.py --preset xxl-384      # one large GPU

Both sides train the same GPT on the same images with the same number of completions; tokenizer and rewards are left
out, advantages are given. Each measurement is a process of its own, the two sides in turn; memory is the peak above the
process with the loaded model. The same run checks that both give the same gradient for the same completions, and fails
where they do not. Wall times need a quiet machine; beside other programs compare `cpu_seconds` with OMP_NUM_THREADS=1.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import reference_algorithm
from grpo.config import Objective, Optimizer, Rollout, Training
from grpo.data import ImageBatch
from grpo.models import GPT, GPTConfig
from grpo.observe import environment
from grpo.parallel import World
from grpo.rollout import TeacherForcedRollout, Trajectory
from grpo.training import OptimizerStep, PolicyUpdate

CLIP, AUX_CE_WEIGHT = 0.2, 0.1


@dataclass(frozen=True)
class Sizes:
    """One setting; B images, G completions of each, T tokens of V codes."""

    dim: int = 256
    n_layer: int = 6
    n_head: int = 4
    V: int = 16384
    T: int = 256
    B: int = 4
    G: int = 8
    reference_batch: int = 8
    """Completions in one forward of the reference algorithm (the published recipe's)."""
    contexts: int = 1
    """Contexts in one forward of ours. On a CPU one is as fast as many, and their activations take less memory."""
    dtype: str = "float32"


PRESETS = {
    "cpu": Sizes(),
    "b-256": Sizes(dim=768, n_layer=12, n_head=12, B=16, contexts=16, dtype="bfloat16"),
    "xxl-384": Sizes(dim=1536, n_layer=48, n_head=24, T=576, B=16, contexts=8, dtype="bfloat16"),
}
MAX_GRADIENT_DIFFERENCE = 1e-5
# Around the preset, on a CPU with 64 tokens instead of 256, or it would take an hour.
SWEEPS = {
    "G": [2, 4, 8, 16],
    "B": [2, 4, 8],
    "T": [64, 144, 256],
    "V": [1024, 4096, 16384],
    "n_layer": [2, 6, 12],
    "dim": [128, 256, 512],
}


def main() -> None:
    """Measure, print, write."""
    options = parse()
    if options.side:
        print(json.dumps(measure(options.side, Sizes(**json.loads(options.sizes)), repeats=options.repeats)))
        return
    sizes = PRESETS[options.preset]
    result = {
        **environment(),
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "preset": options.preset,
        "sizes": asdict(sizes),
        "gradient_difference": check(sizes),
        **compare(sizes, options),
        "growth_G2_to_G8": ours_growth(sizes, options),
    }
    print(
        f"speedup {result['speedup']:.1f}x, memory {result['memory_ratio']:.2f}x of the reference's, time of G=8 over "
        f"G=2 {result['growth_G2_to_G8']:.2f}, relative gradient difference {result['gradient_difference']:.1e}"
    )
    if options.sweep:
        result["sweeps"] = sweep(sizes)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        if options.sweep:
            plot(result["sweeps"], options.json.with_suffix(".png"))
    if result["gradient_difference"] > MAX_GRADIENT_DIFFERENCE:
        sys.exit(f"the gradients differ by more than {MAX_GRADIENT_DIFFERENCE}")


def parse() -> argparse.Namespace:
    """The command line; --side and --sizes are this script's calls of itself."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each process, after one warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, in turn")
    parser.add_argument("--sweep", action="store_true", help="also how both grow with each size; plots beside --json")
    parser.add_argument("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(sizes: Sizes, options: argparse.Namespace) -> dict:
    """Both sides in turn, in fresh processes; medians over all measured steps."""
    runs = {"reference": [], "ours": []}
    for _ in range(options.rounds):
        for side, results in runs.items():
            results.append(spawn(side, sizes, options))
    sides = {side: summary(results) for side, results in runs.items()}
    reference, ours = sides["reference"], sides["ours"]
    return {
        "sides": sides,
        "speedup": reference["seconds"] / ours["seconds"],
        "memory_ratio": ours["peak_bytes"] / reference["peak_bytes"],
    }


def sweep(sizes: Sizes) -> dict[str, list[dict]]:
    """Both sides at several values of each size, the others as they are; one process of each, two measured steps."""
    brief = argparse.Namespace(rounds=1, repeats=2)
    base = replace(sizes, T=64) if not torch.cuda.is_available() else sizes
    results = {}
    for name, values in SWEEPS.items():
        results[name] = []
        for value in values:
            setting = replace(base, **{name: value})
            point = {name: value, "sizes": asdict(setting), **compare(setting, brief)}
            print(f"{name} {value}: speedup {point['speedup']:.1f}x, memory {point['memory_ratio']:.2f}x", flush=True)
            results[name].append(point)
    return results


def ours_growth(sizes: Sizes, options: argparse.Namespace) -> float:
    """Time of ours with 8 completions over its time with 2, in turn."""
    runs: dict[int, list[dict]] = {2: [], 8: []}
    for _ in range(options.rounds):
        for G, results in runs.items():
            results.append(spawn("ours", replace(sizes, G=G), options))
    return summary(runs[8])["seconds"] / summary(runs[2])["seconds"]


def summary(runs: list[dict]) -> dict:
    """Medians of the measured steps of several processes."""
    seconds = [value for run in runs for value in run["seconds"]]
    return {
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "cpu_seconds": statistics.median(value for run in runs for value in run["cpu_seconds"]),
        "sampling_seconds": statistics.median(value for run in runs for value in run["sampling_seconds"]),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
    }


def spawn(side: str, sizes: Sizes, options: argparse.Namespace) -> dict:
    """Measure one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--sizes", json.dumps(asdict(sizes))]
    command += ["--repeats", str(options.repeats)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def setting(sizes: Sizes) -> tuple[GPT, ImageBatch, torch.Tensor, torch.Tensor]:
    """Model, images' ids, codes [B, T] and advantages [B, G] of a setting, on its device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(dim=sizes.dim, n_layer=sizes.n_layer, n_head=sizes.n_head, vocab_size=sizes.V, block_size=sizes.T)
    )
    # LlamaGen starts with an output layer of zeros; this one gives logits as spread as a trained model's (7-8 nats).
    torch.nn.init.normal_(model.output.weight, std=2.0 / sizes.dim**0.5)
    ids = torch.arange(sizes.B)
    batch = ImageBatch(torch.empty(sizes.B, 0), ids % 1000, ids, ids)
    codes, advantages = torch.randint(sizes.V, (sizes.B, sizes.T)), torch.randn(sizes.B, sizes.G)
    model = model.eval().to(device, getattr(torch, sizes.dtype))
    return model, batch.to(device), codes.to(device), advantages.to(device)


def our_step(sizes: Sizes) -> Callable[[], float]:
    """A function that takes a step and returns the seconds of its sampling."""
    model, batch, codes, advantages = setting(sizes)
    optimizer = OptimizerStep(model, Optimizer(), total_steps=1000, max_skipped_steps=1)
    update = policy_update(model, optimizer, sizes)
    rollout = our_rollout(model, codes, sizes)

    def step() -> float:
        sampling = 0.0
        for part in batch.parts(sizes.contexts):
            start = now()
            trajectory = rollout(part)
            sampling += now() - start
            trajectory.advantages = advantages[part.sample_ids]
            update(trajectory)
        update.metrics.means()
        return sampling

    return step


def our_rollout(model: GPT, codes: torch.Tensor, sizes: Sizes) -> TeacherForcedRollout:
    """The rollout of the training recipe; its encoder returns the given codes."""
    config = Rollout(num_generations=sizes.G, batch_size=sizes.B)
    return TeacherForcedRollout(
        model, lambda batch: codes[batch.sample_ids], config, seed=0, keep_graph=True, impl="auto"
    )


def policy_update(model: GPT, optimizer: OptimizerStep, sizes: Sizes) -> PolicyUpdate:
    """One optimizer step per rollout."""
    device = next(model.parameters()).device
    return PolicyUpdate(
        model,
        optimizer,
        objective=Objective(clip_range=CLIP, aux_ce_weight=AUX_CE_WEIGHT),
        rollout=Rollout(num_generations=sizes.G, batch_size=sizes.B),
        training=Training(batch_size=sizes.contexts, gradient_accumulation_steps=sizes.B * sizes.G // sizes.contexts),
        world=World(rank=0, size=1, local_rank=0, local_size=1, device=device),
    )


def reference_step(sizes: Sizes) -> Callable[[], float]:
    """The same for the reference algorithm."""
    model, batch, codes, advantages = setting(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> float:
        start = now()
        trajectory = reference_algorithm.sample(model, batch.class_ids, codes, num_generations=sizes.G)
        sampling = now() - start
        trajectory.advantages = advantages
        reference_algorithm.update(
            model, trajectory, batch_size=sizes.reference_batch, clip=CLIP, aux_ce_weight=AUX_CE_WEIGHT
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sampling

    return step


def measure(side: str, sizes: Sizes, *, repeats: int) -> dict:
    """Seconds of each step and peak memory above the loaded model."""
    step = (our_step if side == "ours" else reference_step)(sizes)
    loaded = memory(reset=True)
    step()
    seconds, sampling, cpu_seconds = [], [], []
    for _ in range(repeats):
        start, start_cpu = now(), time.process_time()
        sampling.append(step())
        seconds.append(now() - start)
        cpu_seconds.append(time.process_time() - start_cpu)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "sampling_seconds": sampling,
        "peak_bytes": memory() - loaded,
    }


def check(sizes: Sizes) -> float:
    """Relative difference of the two gradients for the same completions (fp32, one image, few layers)."""
    small = replace(sizes, B=1, contexts=1, n_layer=2, dtype="float32")
    model, batch, codes, advantages = setting(small)
    trajectory: Trajectory = our_rollout(model, codes, small)(batch)
    trajectory.advantages = advantages
    kept: list[torch.Tensor] = []

    class Keep(OptimizerStep):
        def __call__(self) -> dict[str, float]:
            kept.extend(parameter.grad.clone() for parameter in model.parameters())
            model.zero_grad()
            return {}

    policy_update(model, Keep(model, Optimizer(), total_steps=1, max_skipped_steps=1), small)(trajectory)
    reference_algorithm.update(model, trajectory, batch_size=8, clip=CLIP, aux_ce_weight=AUX_CE_WEIGHT)
    theirs = [parameter.grad for parameter in model.parameters()]
    difference = torch.nn.utils.get_total_norm([a - b for a, b in zip(kept, theirs, strict=True)])
    return (difference / torch.nn.utils.get_total_norm(theirs)).item()


def now() -> float:
    """Seconds; the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(*, reset: bool = False) -> int:
    """Peak bytes since the reset: of the GPU's allocator, or of the whole process on a CPU (Linux)."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def plot(sweeps: dict[str, list[dict]], file: Path, *, seconds_of: str = "step") -> None:
    """Time and memory of both sides over each size."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 6), layout="constrained", squeeze=False)
    for column, (name, points) in zip(axes.T, sweeps.items(), strict=True):
        for axis, quantity, unit in ((column[0], "seconds", 1.0), (column[1], "peak_bytes", 2**30)):
            for side in ("reference", "ours"):
                heights = [point["sides"][side][quantity] / unit for point in points]
                axis.plot([point[name] for point in points], heights, marker="o", label=side)
            axis.set(
                xlabel=name, ylabel=f"seconds a {seconds_of}" if unit == 1.0 else "GiB above the model", ylim=(0, None)
            )
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
