"""Autoregressive sampling with guidance: ours against LlamaGen's sampler, and against the bandwidth of the memory.

python benchmarks/bench_rollout.py                          # CPU, small
python benchmarks/bench_rollout.py --preset xxl-384 --json out.json   # one GPU

The floor is the time to read what a step cannot avoid: all weights of the blocks and the projection once, and the part
of the cache that is filled, at the copy bandwidth measured in the same run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import reference_algorithm
from benchmarks.bench_update import memory, now
from grpo.models import GPT, GPTConfig
from grpo.observe import environment
from grpo.rollout import generate


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
    "xxl-384": Sizes(dim=1536, n_layer=48, n_head=24, T=576, batches=(8, 256)),
}
SAMPLING = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--repeats", type=int, default=3, help="measured calls of each side, in turn, after one warm-up"
    )
    options = parser.parse_args()
    sizes = PRESETS[options.preset]
    model = build(sizes)
    bandwidth = copy_bandwidth(model.output.weight.device)
    rows = [measure(model, sizes, images, bandwidth=bandwidth, repeats=options.repeats) for images in sizes.batches]
    for row in rows:
        seconds = {side: f"{row[side]['seconds']:.2f} s" for side in ("ours", "reference")}
        print(
            f"{row['images']} images: ours {seconds['ours']}, reference {seconds['reference']}, {row['speedup']:.1f}x; "
            f"floor {row['floor_seconds']:.2f} s, {row['share_of_bandwidth']:.0%} of bandwidth"
        )
    if options.json:
        result = {**environment(), "date": date.today().isoformat(), "preset": options.preset, "sizes": asdict(sizes)}
        result |= {"sampling": SAMPLING, "copy_bandwidth": bandwidth, "sides": rows}
        result |= {"speedup": rows[-1]["speedup"], "memory_ratio": rows[-1]["memory_ratio"]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def build(sizes: Sizes) -> GPT:
    """A GPT with random weights whose distribution is as spread as a trained one's."""
    torch.manual_seed(0)
    config = GPTConfig(
        dim=sizes.dim, n_layer=sizes.n_layer, n_head=sizes.n_head, vocab_size=sizes.V, block_size=sizes.T
    )
    model = GPT(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=2.0 / sizes.dim**0.5)
    return model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, sizes.dtype))


def measure(model: GPT, sizes: Sizes, images: int, *, bandwidth: float, repeats: int) -> dict:
    """Both sides in turn for one number of images."""
    class_ids = torch.arange(images, device=model.output.weight.device) % 1000
    sides = {
        "ours": lambda: generate(model, class_ids, **SAMPLING),
        "reference": lambda: reference_algorithm.generate(model, class_ids, **SAMPLING),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for index in range(repeats + 1):
        for name, side in sides.items():
            elapsed, peak = timed(side)
            if index:
                seconds[name].append(elapsed)
                peaks[name] = max(peaks[name], peak)
    result = {name: {"seconds": statistics.median(seconds[name]), "peak_bytes": peaks[name]} for name in sides}
    floor = floor_bytes(model, sizes, images) / bandwidth
    return {
        "images": images,
        **result,
        "speedup": result["reference"]["seconds"] / result["ours"]["seconds"],
        "memory_ratio": peaks["ours"] / max(peaks["reference"], 1),
        "floor_seconds": floor,
        "share_of_bandwidth": floor / result["ours"]["seconds"],
    }


def timed(side: Callable[[], torch.Tensor]) -> tuple[float, int]:
    """Seconds of one call, and peak bytes above what there was before it."""
    before = memory(reset=True)
    start = now()
    side()
    return now() - start, memory() - before


def floor_bytes(model: GPT, sizes: Sizes, images: int) -> int:
    """Bytes that T decode steps must read: weights every step, and the filled part of both halves' caches."""
    weights = sum(p.numel() * p.element_size() for p in (*model.layers.parameters(), *model.output.parameters()))
    row = 2 * sizes.n_layer * sizes.dim * model.output.weight.element_size()  # keys and values of one position
    filled = sizes.T * (sizes.T + 1) // 2
    return weights * sizes.T + 2 * images * row * filled


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read a second by a large copy (it reads and writes as much), the best of a few."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = now()
        target.copy_(source)
        best = min(best, now() - start)
    return 2 * source.numel() / best


if __name__ == "__main__":
    main()
