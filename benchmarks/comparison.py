"""What the benchmarks of ours against the reference algorithm share: the clock, a model, what goes into the JSON."""

import importlib.util
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from grpo.environment import environment
from grpo.models import GPT, GPTConfig
from harness import write_whole

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Seconds; the GPU has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_model(*, dim: int, n_layer: int, n_head: int, V: int, T: int, dtype: str) -> GPT:
    """A GPT with random weights, in eval mode, on the device, always the same."""
    torch.manual_seed(0)
    with DEVICE:  # a CPU takes half a minute for the weights of GPT-XXL
        model = GPT(GPTConfig(dim=dim, n_layer=n_layer, n_head=n_head, vocab_size=V, block_size=T))
    spread_logits(model)
    return model.eval().to(DEVICE, getattr(torch, dtype))


def spread_logits(model: GPT) -> None:
    """Give logits as spread as a trained model's (7-8 nats). LlamaGen starts with an output layer of zeros."""
    torch.nn.init.normal_(model.output.weight, std=2.0 / model.config.dim**0.5)


def header() -> dict[str, Any]:
    """Hardware, versions, date and threads."""
    return {**environment(), "date": date.today().isoformat(), "threads": torch.get_num_threads()}


def write(result: dict[str, Any], file: Path | None, *, seconds_of: str = "step") -> None:
    """The result as JSON where a file is wanted, with a plot of its sweeps beside it."""
    if file is None:
        return
    write_whole(file, result)
    if "sweeps" in result:
        plot(result["sweeps"], file.with_suffix(".png"), seconds_of=seconds_of)


def plot(sweeps: dict[str, list[dict]], file: Path, *, seconds_of: str) -> None:
    """Time and memory of both sides over each size."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 6), layout="constrained", squeeze=False)
    quantities = (("seconds", 1.0, f"seconds a {seconds_of}"), ("peak_bytes", 2**30, "GiB above the model"))
    for column, (name, points) in zip(axes.T, sweeps.items(), strict=True):
        for axis, (quantity, unit, label) in zip(column, quantities, strict=True):
            for side in ("reference", "ours"):
                heights = [point["sides"][side][quantity] / unit for point in points]
                axis.plot([point[name] for point in points], heights, marker="o", label=side)
            axis.set(xlabel=name, ylabel=label, ylim=(0, None))
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")
