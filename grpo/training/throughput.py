"""How much work a step is, and how fast that makes the device.

Work is counted in floating-point operations of matrix products, a multiply-add as two. With L layers of width D, F the
feed-forward's width, Q the width of queries, keys and values together, and S rows a sequence, the blocks of the GPT
take for one sequence forward

    L * (2 S (D Q + D D + 3 D F) + 4 S S D)

and the output projection 2 D V a row. Attention counts all S x S scores, as is usual (Chowdhery et al., PaLM, arXiv
2204.02311, appendix B), although half of them are masked. A backward takes twice its forward. What is computed again
only to save memory (activation checkpointing, logits of the projection) is not counted: it is no progress.
"""

from collections.abc import Mapping

import torch

from grpo.config import GRPORecipe
from grpo.models import GPTConfig
from grpo.parallel import read_peak_memory
from grpo.training.update import optimizer_steps

# Dense bf16 matrix FLOP/s by the vendors' data sheets; the first key that is part of the device's name counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def blocks_flops(config: GPTConfig, sequences: float = 1, *, rows: int | None = None) -> float:
    """Forward FLOPs of the blocks on `sequences` of `rows` rows (default T)."""
    rows = config.block_size if rows is None else rows
    products = config.dim * (config.qkv_dim + config.dim + 3 * config.ffn_dim)
    return sequences * config.n_layer * (2 * rows * products + 4 * rows**2 * config.dim)


def projection_flops(config: GPTConfig, rows: float) -> float:
    """Forward FLOPs of the output projection of `rows` hidden states to logits."""
    return 2 * rows * config.dim * config.vocab_size


def grpo_flops(recipe: GRPORecipe, config: GPTConfig, *, shares_forward: bool) -> dict[str, float]:
    """FLOPs of the GPT in one step on one rank, in the phases "rollout" and "update".

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
    return {"rollout": guided * forward + project, "update": update}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its data sheet, whatever the precision of the run; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def throughput(
    seconds: Mapping[str, float], *, images: int, codes: int, flops: Mapping[str, float], device: torch.device
) -> dict[str, float]:
    """Metrics of a step's speed.

    Args:
        seconds: as `PhaseTimer.read` gives them.
        images: of all ranks.
        codes: of one image, 0 where the job has none.
        flops: of each phase, on this rank; may be empty.
        device: of this rank.

    Returns:
        `images_per_second`; with codes `tokens_per_second`; with FLOPs and on a known GPU the shares of its peak, `mfu`
        of the whole step's wall time and `mfu/<phase>` of a phase's own; `memory/peak_gb`.
    """
    rate = images / seconds["seconds/step"]
    metrics = {"images_per_second": rate, "memory/peak_gb": read_peak_memory(device)}
    if codes:
        metrics["tokens_per_second"] = rate * codes
    peak = peak_flops(device)
    if flops and peak:
        metrics["mfu"] = sum(flops.values()) / (seconds["seconds/step"] * peak)
        metrics |= {f"mfu/{phase}": work / (seconds[f"seconds/{phase}"] * peak) for phase, work in flops.items()}
    return metrics
