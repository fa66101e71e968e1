"""Autoregressive sampling with guidance: ours against LlamaGen's sampler, and against the bandwidth of the memory.

python benchmarks/bench_rollout.py                          # CPU, small: a minute
python benchmarks/bench_rollout.py --json out.json --sweep    # and three more
python benchmarks/bench_rollout.py --preset xxl-384 --json out.json   # one GPU

Ours draws again and again with one sampler, as a training run does; its first call compiles and captures. On a GPU
"plain" is the same sampler with the model's own forward in place of the fused kernels, and a step is looked at closely:
its time at half of the cache, and its kernels by name.

The floor is the time to read what a step cannot avoid: all weights of the blocks and the projection once, and the part
of the cache that is filled, at the copy bandwidth measured in the same run.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from comparison import DEVICE, header, now, random_model, write

import reference_algorithm
from grpo.estimate import measured_peaks
from grpo.kernels import Draw
from grpo.models import GPT, ClassCondition, family_of
from grpo.models.costs import extension_bytes
from grpo.rollout import CodeSampler
from grpo.rollout.cached_sampler import CachedSampler
from harness import peak_bytes


@dataclass(frozen=True)
class Sizes:
    """One model and how many images it draws at once."""

    dim: int
    n_layer: int
    n_head: int
    T: int
    batches: tuple[int, ...]
    V: int = 16384
    dtype: str = "bfloat16"


PRESETS = {
    "cpu": Sizes(dim=256, n_layer=6, n_head=4, T=64, batches=(8, 32), dtype="float32"),
    "b-256": Sizes(dim=768, n_layer=12, n_head=12, T=256, batches=(8, 256)),
    "xxl-384": Sizes(dim=1536, n_layer=48, n_head=24, T=576, batches=(8, 128, 256)),
}
SWEEPS = {"images": [2, 8, 32], "T": [16, 64, 144], "V": [1024, 4096, 16384], "n_layer": [2, 6, 12]}
MOST_REFERENCE_IMAGES = 32  # beyond, LlamaGen's way takes minutes
CFG_SCALE = 2.0
SAMPLING = {"cfg_scale": CFG_SCALE, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of ours after the first")
    parser.add_argument("--sweep", action="store_true", help="also how both grow with each size; plots beside --json")
    parser.add_argument("--batches", type=int, nargs="+", help="images at once, in place of the preset's")
    parser.add_argument("--without", nargs="+", default=(), help="sides to leave out")
    options = parser.parse_args()
    sizes = PRESETS[options.preset]
    model = build(sizes)
    bandwidth = measured_peaks(DEVICE).bandwidth
    result = {**header(), "preset": options.preset, "sizes": asdict(sizes)}
    result |= {"sampling": SAMPLING, "copy_bandwidth": bandwidth, "batches": []}
    for images in options.batches or sizes.batches:

        def note(row: dict, before: list[dict] = result["batches"]) -> None:  # after each side
            result.update({name: row.get(name) for name in ("sides", "speedup", "memory_ratio")})
            write(result | {"batches": [*before, row]}, options.json)

        how = {"bandwidth": bandwidth, "repeats": options.repeats, "without": options.without}
        result["batches"].append(measure(model, images, **how, note=note))
    if options.sweep:
        del model
        result["sweeps"] = sweep(sizes, bandwidth)
    write(result, options.json, seconds_of="rollout")


def sweep(sizes: Sizes, bandwidth: float) -> dict[str, list[dict]]:
    """Both sides at several values of each size, the others as in the preset with its fewest images."""
    results = {}
    for name, values in SWEEPS.items():
        results[name] = []
        for value in values:
            setting = sizes if name == "images" else replace(sizes, **{name: value})
            images = value if name == "images" else sizes.batches[0]
            print(f"{name} {value}: ", end="")
            results[name].append({name: value, **measure(build(setting), images, bandwidth=bandwidth, repeats=1)})
    return results


def build(sizes: Sizes) -> GPT:
    """A frozen GPT with random weights."""
    model = random_model(
        dim=sizes.dim, n_layer=sizes.n_layer, n_head=sizes.n_head, V=sizes.V, T=sizes.T, dtype=sizes.dtype
    )
    return model.requires_grad_(False)


def measure(
    model: GPT,
    images: int,
    *,
    bandwidth: float,
    repeats: int,
    without: Sequence[str] = (),
    note: Callable[[dict], None] = lambda _: None,
) -> dict:
    """All sides for one number of images: ours first, for the reference takes long. `note` is told after each."""
    class_ids = torch.arange(images, device=DEVICE) % 1000
    condition, row_ids = ClassCondition(class_ids), torch.arange(images, device=DEVICE)
    samplers = {
        name: CodeSampler(model, draw=Draw(impl=impl), cfg_scale=CFG_SCALE)
        for name, impl in {"ours": "auto", "plain": "reference"}.items()
    }
    runs = {
        "ours": lambda: samplers["ours"](condition, row_ids=row_ids),
        "step": lambda: step_on_gpu(model, images),
        "library_step": lambda: step_on_gpu(model, images, few_rows=0),
        "plain": lambda: samplers["plain"](condition, row_ids=row_ids),
        "reference": lambda: reference_algorithm.generate(model, class_ids, **SAMPLING),
    }
    for name in without:
        del runs[name]
    if not class_ids.is_cuda:
        for name in ("step", "library_step", "plain"):
            runs.pop(name, None)
        for run in runs.values():  # the memory of libraries that are used for the first time is not a side's
            run()
    floor = extension_bytes(model.config, 2 * images, dtype=model.output.weight.dtype) / bandwidth  # both halves
    result = {"images": images, "sides": {}, "failed": {}, "floor_seconds": floor}
    if images > MOST_REFERENCE_IMAGES:
        for name in ("library_step", "plain", "reference"):
            runs.pop(name, None)
        repeats = min(repeats, 1)
    for name, run in runs.items():
        again = {"ours": repeats, "plain": 1}.get(name, 0) if class_ids.is_cuda else repeats
        try:
            if name.endswith("step"):
                result[name] = run()
            else:
                result["sides"][name] = timed_side(run, repeats=again)
        except Exception as error:
            result["failed"][name] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
        samplers.pop(name, None)  # with what it kept
        note(result)
        gc.collect()
        if class_ids.is_cuda:
            torch.cuda.empty_cache()
    ours, reference = (result["sides"].get(name) for name in ("ours", "reference"))
    text = f"{images} images: floor {floor:.2f} s"
    if ours:
        result["share_of_bandwidth"] = floor / ours["seconds"]
        result["ms_per_step"] = 1000 * ours["seconds"] / model.config.block_size
        text += f", ours {ours['seconds']:.2f} s (first {ours['first_seconds']:.2f}), "
        text += f"{result['ms_per_step']:.2f} ms a step, "
        text += f"{result['share_of_bandwidth']:.0%} of bandwidth, {ours['peak_bytes'] / 2**30:.1f} GiB"
    if "plain" in result["sides"]:
        text += f", plain {result['sides']['plain']['seconds']:.2f} s"
    for name in ("step", "library_step"):
        if name in result:
            text += f", {name} {result[name]['seconds'] * 1e3:.2f} ms, {result[name]['kernels']} kernels"
    if reference:
        text += f", reference {reference['seconds']:.2f} s"
    if ours and reference:
        result["speedup"] = reference["seconds"] / ours["seconds"]
        result["memory_ratio"] = ours["peak_bytes"] / max(reference["peak_bytes"], 1)
        text += f", {result['speedup']:.1f}x, memory {result['memory_ratio']:.2f}x"
    note(result)
    print(text, *(f"{name} FAILED {reason}" for name, reason in result["failed"].items()), sep="; ", flush=True)
    return result


def step_on_gpu(model: GPT, images: int, *, replays: int = 20, few_rows: int | None = None) -> dict:
    """Seconds of a replayed step where half of the cache is filled, and what its kernels take, the longest first.

    `few_rows` is up to how many rows our own products are taken, by default as in a rollout.
    """
    forward = family_of(model).cached_forward(model, impl="auto", copies=True)
    forward.few_rows = forward.few_rows if few_rows is None else few_rows
    engine = CachedSampler(forward, images, draw=Draw(), cfg_scale=CFG_SCALE, cfg_interval=-1)
    engine.start(ClassCondition(engine.row_ids), engine.row_ids)
    engine.row.fill_(engine.length // 2)
    for _ in range(3):
        engine.extend()
    start = now()
    for _ in range(replays):
        engine.extend()
    seconds = (now() - start) / replays
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.extend()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name[:80], []).append(event.device_time_total)
    table = [
        {"name": name, "launches": len(times), "microseconds": sum(times)}
        for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))
    ]
    launches = sum(row["launches"] for row in table)
    return {"seconds": seconds, "replayed": engine.replay.graph is not None, "kernels": launches, "by_name": table}


def timed_side(run: Callable[[], object], *, repeats: int) -> dict:
    """Peak memory and seconds of a first call, which compiles and captures, and the median of `repeats` more."""
    start = now()
    peak = peak_bytes(run)
    first, seconds = now() - start, []
    for _ in range(repeats):
        start = now()
        run()
        seconds.append(now() - start)
    return {"seconds": statistics.median(seconds or [first]), "first_seconds": first, "peak_bytes": peak}


if __name__ == "__main__":
    main()
