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
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from comparison import DEVICE, header, now, random_model, write

import reference_algorithm
from grpo.config import Objective, Optimizer, Rollout, Schedule, Training
from grpo.data import ImageBatch
from grpo.kernels import Draw
from grpo.models import GPT, ClassCondition
from grpo.parallel import MetricSums
from grpo.rollout import TeacherForcedRollout
from grpo.training import GuardedOptimizer, PolicyUpdate
from harness import peak_bytes

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
        **header(),
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
    write(result, options.json)
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
    model = random_model(
        dim=sizes.dim, n_layer=sizes.n_layer, n_head=sizes.n_head, V=sizes.V, T=sizes.T, dtype=sizes.dtype
    )
    ids = torch.arange(sizes.B)
    batch = ImageBatch(torch.empty(sizes.B, 0), ClassCondition(ids % 1000), ids, ids)
    codes, advantages = torch.randint(sizes.V, (sizes.B, sizes.T)), torch.randn(sizes.B, sizes.G)
    return model, batch.to(DEVICE), codes.to(DEVICE), advantages.to(DEVICE)


def our_parts(
    model: GPT, optimizer: GuardedOptimizer, codes: torch.Tensor, sizes: Sizes
) -> tuple[Schedule, TeacherForcedRollout, PolicyUpdate]:
    """Schedule, rollout and update of the training recipe, one optimizer step a rollout; encoding gives `codes`."""
    config = Rollout(num_generations=sizes.G, batch_size=sizes.B)
    objective = Objective(clip_range=CLIP, aux_ce_weight=AUX_CE_WEIGHT)
    training = Training(micro_batch_size=sizes.contexts)
    schedule = Schedule.of(rollout=config, training=training, objective=objective, ranks=1)
    shared = {"draw": Draw(), "schedule": schedule}
    rollout = TeacherForcedRollout(model, lambda batch: codes[batch.sample_ids], config, **shared)
    return schedule, rollout, PolicyUpdate(model, optimizer, objective=objective, rollout=config, **shared)


def our_step(sizes: Sizes) -> Callable[[], float]:
    """A function that takes a step and returns the seconds of its sampling."""
    model, batch, codes, advantages = setting(sizes)
    optimizer = GuardedOptimizer(model, Optimizer(), total_steps=1000, max_skipped_steps=1)
    schedule, rollout, update = our_parts(model, optimizer, codes, sizes)

    def step() -> float:
        sampling, metrics = 0.0, MetricSums()
        for part in batch.parts(schedule.images_per_part):
            start = now()
            trajectory = rollout(part)
            sampling += now() - start
            trajectory.advantages = advantages[part.sample_ids]
            metrics.merge(update(trajectory))
        metrics.means()
        return sampling

    return step


def reference_step(sizes: Sizes) -> Callable[[], float]:
    """The same for the reference algorithm."""
    model, batch, codes, advantages = setting(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> float:
        start = now()
        trajectory = reference_algorithm.sample(model, batch.condition, codes, num_generations=sizes.G)
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
    seconds, sampling, cpu_seconds = [], [], []

    def steps() -> None:
        step()
        for _ in range(repeats):
            start, start_cpu = now(), time.process_time()
            sampling.append(step())
            seconds.append(now() - start)
            cpu_seconds.append(time.process_time() - start_cpu)

    peak = peak_bytes(steps)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "sampling_seconds": sampling, "peak_bytes": peak}


def check(sizes: Sizes) -> float:
    """Relative difference of the two gradients for the same completions (fp32, one image, few layers)."""
    small = replace(sizes, B=1, contexts=1, n_layer=2, dtype="float32")
    model, batch, codes, advantages = setting(small)
    kept: list[torch.Tensor] = []

    class Keep(GuardedOptimizer):
        def step(self) -> dict[str, float]:
            kept.extend(parameter.grad.clone() for parameter in model.parameters())
            model.zero_grad()
            return {}

    optimizer = Keep(model, Optimizer(), total_steps=1, max_skipped_steps=1)
    _, rollout, update = our_parts(model, optimizer, codes, small)
    trajectory = rollout(batch)
    trajectory.advantages = advantages
    update(trajectory)
    reference_algorithm.update(model, trajectory, batch_size=8, clip=CLIP, aux_ce_weight=AUX_CE_WEIGHT)
    theirs = [parameter.grad for parameter in model.parameters()]
    difference = torch.nn.utils.get_total_norm([a - b for a, b in zip(kept, theirs, strict=True)])
    return (difference / torch.nn.utils.get_total_norm(theirs)).item()


if __name__ == "__main__":
    main()
