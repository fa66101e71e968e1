"""How much work a step is, what a device can do at most, and how fast that makes it."""

import functools
import timeit
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from grpo.config import GRPORecipe, Schedule
from grpo.models import get_family
from grpo.parallel import compute_dtype, read_peak_memory


class Work(NamedTuple):
    """What a step of one rank must do, by phase."""

    flops: Mapping[str, float] = MappingProxyType({})  # of the generator's matrix products
    bytes: Mapping[str, float] = MappingProxyType({})  # to be read from memory, in phases that are bound by that


def grpo_work(recipe: GRPORecipe, sizes: Any, schedule: Schedule) -> Work:
    """Work of the generator, whose sizes are given, in one step on one rank, in the phases "rollout" and "update".

    A forward that rollout and update share is counted to the rollout.
    """
    rollout, costs = recipe.rollout, get_family(recipe.model.name).costs
    forced = rollout.mode == "teacher_forced"
    contexts = schedule.images if forced else schedule.completions
    sampled, scored = (1 if scale == 1.0 else 2 for scale in (rollout.cfg_scale, rollout.loss_cfg_scale))

    def forward(sequences: int, copies: int = 1, *, of_a_text: int = 1) -> float:
        """With guidance the blocks see two copies, the projection one."""
        project = costs.projection_flops(sizes, sequences * sizes.block_size)
        texts = copies * sequences // of_a_text
        return costs.blocks_flops(sizes, copies * sequences, texts=texts) + project

    # A group that spreads over several optimizer steps passes through the model in each of them.
    splits = schedule.epochs * (max(1, schedule.group_size // schedule.completions_per_step) if forced else 1)
    passes = len(schedule.dropout_passes)
    others = int(not schedule.on_policy) + int(recipe.objective.kl_estimator != "none")  # old policy, reference
    there_and_back = 2 if recipe.lora.rank else 3  # a backward is as much as two, or one where weights are frozen
    forwards = passes * (there_and_back * splits + others) - int(schedule.trains_sampling_forward)
    update = forwards * forward(contexts, scored, of_a_text=schedule.rows_of_a_condition)
    if not forced and schedule.scores_targets:
        update += passes * there_and_back * schedule.epochs * forward(schedule.images)
    flops = {"rollout": forward(contexts, sampled, of_a_text=contexts // schedule.images), "update": update}
    if forced:
        return Work(flops)
    dtype = compute_dtype(recipe.training.mixed_precision)
    return Work(flops, {"rollout": costs.extension_bytes(sizes, sampled * contexts, dtype=dtype)})


class Peaks(NamedTuple):
    """Rates that no program exceeds."""

    flops: float  # matrix FLOP/s: dense bf16 by the data sheet, or what a product was seen to reach
    bandwidth: float  # bytes/s of its memory


# By the vendors' data sheets; the first key that is part of the device's name counts.
DATA_SHEETS = {
    "B200": Peaks(2250e12, 8.0e12),
    "H200": Peaks(989e12, 4.8e12),
    "H100 PCIe": Peaks(756e12, 2.0e12),
    "H100 NVL": Peaks(835e12, 3.9e12),
    "H100": Peaks(989e12, 3.35e12),
    "A100-SXM4-80GB": Peaks(312e12, 2.039e12),
    "A100 80GB": Peaks(312e12, 1.935e12),
    "A100": Peaks(312e12, 1.555e12),
    "L40S": Peaks(362e12, 0.864e12),
    "RTX 4090": Peaks(165e12, 1.008e12),
    "MI300X": Peaks(1307e12, 5.3e12),
}


def device_peaks(device: torch.device) -> Peaks:
    """The peaks of a device by its data sheet; of one that is not known, what it reaches now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = (peaks for part, peaks in DATA_SHEETS.items() if part in name)
    return next(known, None) or measured_peaks(device)


@functools.cache
def measured_peaks(device: torch.device) -> Peaks:
    """What a device reaches now on a plain product and a plain copy, bf16 on a GPU, else fp32; in half a second."""
    size, numbers, dtype = (8192, 1 << 28, torch.bfloat16) if device.type == "cuda" else (768, 1 << 24, torch.float32)
    matrix, source = torch.ones(size, size, dtype=dtype, device=device), torch.ones(numbers, device=device)
    target, product = torch.empty_like(source), torch.empty_like(matrix)

    def fastest(function: Callable[[], object]) -> float:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
        return min(timeit.repeat(lambda: (function(), wait(device)), repeat=5, number=1))

    return Peaks(
        flops=2 * size**3 / fastest(lambda: torch.mm(matrix, matrix, out=product)),
        bandwidth=2 * source.nbytes / fastest(lambda: target.copy_(source)),  # reads and writes
    )


def throughput(
    seconds: Mapping[str, float], *, images: int, codes: int, work: Work, device: torch.device
) -> dict[str, float]:
    """Metrics of a step's speed.

    Args:
        seconds: as `PhaseTimer.read` gives them.
        images: of all ranks.
        codes: of one image, 0 where the job has none.
        work, device: of this rank; the work may be empty.

    Returns:
        `images_per_second`; with codes `tokens_per_second`; with FLOPs the shares of the device's peak, `mfu` of the
        whole step's wall time and `mfu/<phase>` of a phase's own; with bytes `bandwidth/<phase>`, the share of the
        memory's; `memory/peak_gb`.
    """
    rate = images / seconds["seconds/step"]
    metrics = {"images_per_second": rate, "memory/peak_gb": read_peak_memory(device)}
    if codes:
        metrics["tokens_per_second"] = rate * codes
    if work.flops:
        peaks = device_peaks(device)
        metrics["mfu"] = sum(work.flops.values()) / (seconds["seconds/step"] * peaks.flops)
        for name, amounts, peak in (("mfu", work.flops, peaks.flops), ("bandwidth", work.bytes, peaks.bandwidth)):
            for phase, amount in amounts.items():
                metrics[f"{name}/{phase}"] = amount / (seconds[f"seconds/{phase}"] * peak)
    return metrics
