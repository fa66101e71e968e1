"""How much work a step is, and how fast that makes the device.

Work is counted in floating-point operations of matrix products, a multiply-add as two. With L layers of width D, F the
feed-forward's width, Q the width of queries, keys and values together, and S rows a sequence, the blocks of the GPT
take for one sequence forward

    L * (2 S (D Q + D D + 3 D F) + 4 S S D)

and the output projection 2 D V a row. Attention counts all S x S scores, as is usual (Chowdhery et al., PaLM, arXiv
2204.02311, appendix B), although half of them are masked. A backward takes twice its forward. What is computed again
only to save memory (activation checkpointing, logits of the projection) is not counted: it is no progress.

Autoregressive decoding computes little and reads much: in each of T steps the weights of blocks and projection once,
and the keys and values of the rows so far of every sequence. Its yardstick is the memory's bandwidth.
"""

import functools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from grpo.config import GRPORecipe
from grpo.models import GPTConfig
from grpo.parallel import compute_dtype, read_peak_memory
from grpo.training.update import optimizer_steps


class Peaks(NamedTuple):
    """What a device can do at most."""

    flops: float
    """Matrix FLOP/s: dense bf16 by the data sheet, or what a product was seen to reach."""
    bandwidth: float
    """Bytes/s of its memory."""


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


class Work(NamedTuple):
    """What a step of one rank must do, by phase."""

    flops: Mapping[str, float] = MappingProxyType({})
    """Of the GPT's matrix products."""
    bytes: Mapping[str, float] = MappingProxyType({})
    """To be read from memory, in phases that are bound by that."""


def blocks_flops(config: GPTConfig, sequences: float = 1, *, rows: int | None = None) -> float:
    """Forward FLOPs of the blocks on `sequences` of `rows` rows (default T)."""
    rows = config.block_size if rows is None else rows
    products = config.dim * (config.qkv_dim + config.dim + 3 * config.ffn_dim)
    return sequences * config.n_layer * (2 * rows * products + 4 * rows**2 * config.dim)


def projection_flops(config: GPTConfig, rows: float) -> float:
    """Forward FLOPs of the output projection of `rows` hidden states to logits."""
    return 2 * rows * config.dim * config.vocab_size


def decode_bytes(config: GPTConfig, sequences: float, *, itemsize: int) -> float:
    """Bytes that T decode steps of `sequences` sequences, decoded together, must read; `itemsize` bytes a number."""
    weights = config.n_layer * config.dim * (config.qkv_dim + config.dim + 3 * config.ffn_dim)
    weights += config.dim * config.vocab_size
    row = 2 * config.n_layer * config.kv_heads * config.head_dim  # keys and values of one position
    filled = config.block_size * (config.block_size + 1) / 2
    return itemsize * (config.block_size * weights + sequences * row * filled)


def grpo_work(recipe: GRPORecipe, config: GPTConfig, *, shares_forward: bool) -> Work:
    """Work of the GPT in one step on one rank, in the phases "rollout" and "update".

    Args:
        shares_forward: the rollout's forward is the update's (`PolicyUpdate.shares_forward`) and counted to it alone.
    """
    rollout, objective, length = recipe.rollout, recipe.objective, config.block_size
    images, group = rollout.batch_size, rollout.num_generations
    per_step, steps = optimizer_steps(rollout, recipe.training)
    forced = rollout.mode == "teacher_forced"
    contexts = images if forced else images * group
    guided = 1 if rollout.cfg_scale == 1.0 else 2
    guided_update = guided if rollout.guidance_in_loss == "guided" else 1
    forward = blocks_flops(config, contexts)
    project = projection_flops(config, contexts * length)
    # A group that spreads over several optimizer steps passes through the model in each of them.
    passes = max(1, group // per_step) if forced else 1
    update = passes * 3 * (guided_update * forward + project)
    scored = int(steps > 1) + int(objective.kl_estimator != "none")  # old policy, reference
    update += scored * (guided_update * forward + project)
    if shares_forward:
        update -= forward + project
    if not forced and objective.aux_ce_weight > 0:
        update += 3 * (blocks_flops(config, images) + projection_flops(config, images * length))
    flops = {"rollout": guided * forward + project, "update": update}
    if forced:
        return Work(flops)
    itemsize = compute_dtype(recipe.training.mixed_precision).itemsize
    return Work(flops, {"rollout": decode_bytes(config, guided * contexts, itemsize=itemsize)})


@functools.cache
def device_peaks(device: torch.device) -> Peaks:
    """The peaks of a device by its data sheet; of one that is not known, what it reaches now, in half a second."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peaks for part, peaks in DATA_SHEETS.items() if part in name), None)
        if known is not None:
            return known
    size, numbers, dtype = (4096, 1 << 28, torch.bfloat16) if device.type == "cuda" else (768, 1 << 24, torch.float32)
    matrix, source = torch.ones(size, size, dtype=dtype, device=device), torch.ones(numbers, device=device)
    target, product = torch.empty_like(source), torch.empty_like(matrix)
    return Peaks(
        flops=2 * size**3 / _fastest(lambda: torch.mm(matrix, matrix, out=product), device),
        bandwidth=2 * source.nbytes / _fastest(lambda: target.copy_(source), device),  # reads and writes
    )


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def throughput(
    seconds: Mapping[str, float], *, images: int, codes: int, work: Work, device: torch.device
) -> dict[str, float]:
    """Metrics of a step's speed.

    Args:
        seconds: as `PhaseTimer.read` gives them.
        images: of all ranks.
        codes: of one image, 0 where the job has none.
        work: of this rank; may be empty.
        device: of this rank.

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
