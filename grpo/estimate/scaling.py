"""How long a teacher-forced GRPO step takes on many GPUs, from what they compute and what they send one another.

A collective of n bytes among S ranks on H hosts lets every GPU receive n (S - 1) / S over NVLink and every host
n (H - 1) / H over its network cards; the slower one counts. Gathers overlap with the computation of the pass that they
are for, and so do reductions with the last backward; what is longer than its pass is waited for.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from grpo.config import GRPORecipe, Parallel, Training
from grpo.estimate.memory import models_on_meta
from grpo.estimate.speed import DATA_SHEETS, grpo_work
from grpo.parallel import blocks_of, mixed_precision_policy, reshards_after_forward, shards_blocks


class Traffic(NamedTuple):
    """Bytes of the tensors of one optimizer step's collectives, on one rank, and how many collectives there are."""

    gathered: int  # results of all-gathers within the ranks that share one copy of the model
    reduced: int  # inputs of reduce-scatters within them
    averaged: int  # tensors of all-reduces between the copies
    collectives: int


def step_traffic(
    model: nn.Module,
    *,
    mesh: tuple[int, ...],
    parallel: Parallel,
    training: Training,
    micro_batches: int,
    samplings: int = 0,
) -> Traffic:
    """What `parallelize` makes the ranks send in an optimizer step.

    Args:
        model: blocks in `model.layers`; may be on the meta device, and is not yet parallelized.
        mesh: see `mesh_shape`.
        micro_batches: forwards with backward.
        samplings: forwards without.
    """
    ranks, shard = math.prod(mesh), mesh[-1]
    if ranks == 1:
        return Traffic(0, 0, 0, 0)
    policy = mixed_precision_policy(training.mixed_precision, training.grad_precision)
    element, reduced = ((dtype or torch.float32).itemsize for dtype in (policy.param_dtype, policy.reduce_dtype))
    blocks = blocks_of(model) if shards_blocks(parallel, ranks=ranks) else []
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    root = sum(_padded(parameter, shard) for parameter in outside)
    in_blocks = sum(_padded(parameter, shard) for block in blocks for parameter in block.parameters())
    units = [_trained(unit, shard) for unit in (*(block.parameters() for block in blocks), outside)]
    trained, trained_units = sum(units), sum(map(bool, units))  # the others have no gradient
    kept = not reshards_after_forward(parallel, ranks=ranks)  # until the step
    passes = 1 if kept else 2 * micro_batches + samplings
    root_passes = 1 if kept else micro_batches  # a sampling leaves the root gathered
    reductions = 1 if parallel.defer_gradient_sync else micro_batches
    gathers = passes * len(blocks) + root_passes
    averages = reductions * trained_units if ranks > shard else 0
    return Traffic(
        gathered=element * (passes * in_blocks + root_passes * root) if shard > 1 else 0,
        reduced=reduced * reductions * trained if shard > 1 else 0,
        averaged=reduced * reductions * trained // shard if averages else 0,
        collectives=(gathers + reductions * trained_units) * (shard > 1) + averages,
    )


def _trained(parameters: Iterable[nn.Parameter], shard: int) -> int:
    """Elements, with padding, of those that are trained."""
    return sum(_padded(parameter, shard) for parameter in parameters if parameter.requires_grad)


def _padded(parameter: torch.Tensor, shard: int) -> int:
    """Elements of a parameter that is cut along its first dimension into pieces of equal size."""
    return shard * math.ceil(len(parameter) / shard) * math.prod(parameter.shape[1:])


class Machine(NamedTuple):
    """Rates that steps of GPT-XXL at 384 pixels were seen to have on an H100 (docs/gpu_results.md, 2026-11-26)."""

    flops: float = DATA_SHEETS["H100"].flops
    bandwidth: float = 2.95e12  # bytes/s of memory
    rollout_share: float = 0.49  # of the peak
    update_share: float = 0.46
    host_seconds: float = 5.4e-3  # of the host for a block's share of a micro-batch: sampling, forward, backward
    decode_seconds: float = 2.21 / 1024 / 384**2  # a pixel of VQ-16 in bf16, compiled
    reward_seconds: float = 0.30 / 1024 / 384**2  # a pixel, squared error and LPIPS
    encode_seconds: float = 0.25 / 128 / 384**2  # a pixel in TF32, compiled
    gpu_link: float = 360e9  # bytes/s that a GPU receives over NVLink: four fifths of the data sheet
    network: float = 42e9  # bytes/s of the network card of each GPU: 400 Gbit/s, of which 85 %
    latency: float = 30e-6  # seconds of a collective, times log2 of its ranks


H100 = Machine()


class StepSeconds(NamedTuple):
    """A step on one rank; the parts add up to it."""

    generator: float  # rollout and update, computed
    rewards: float  # encoding, decoding, scoring
    optimizer: float
    waiting: float  # for gathers and reductions that are longer than what they overlap with

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self)


def step_seconds(
    recipe: GRPORecipe, *, mesh: tuple[int, ...], hosts: int, machine: Machine = H100
) -> tuple[StepSeconds, Traffic]:
    """The time of a step of a teacher-forced recipe with one optimizer step a rollout, and what it sends.

    Not in it: images that come late, ranks that are slower than others, links that others use too.

    Args:
        mesh: see `mesh_shape`.
        hosts: that the ranks are on, as many on each.
    """
    ranks, shard = math.prod(mesh), mesh[-1]
    schedule, side = recipe.schedule(ranks=ranks), recipe.data.image_size
    assert recipe.rollout.mode == "teacher_forced"
    assert schedule.on_policy
    model, _ = models_on_meta(recipe)
    micro_batches = math.ceil(schedule.images / schedule.micro_batch_size)
    traffic = step_traffic(
        model,
        mesh=mesh,
        parallel=recipe.parallel,
        training=recipe.training,
        micro_batches=micro_batches * len(schedule.dropout_passes),
        samplings=0 if schedule.trains_sampling_forward else micro_batches,
    )
    flops = grpo_work(recipe, model.config, schedule).flops
    again = len(schedule.dropout_passes) * (recipe.activation_checkpoint.mode == "full")  # forwards inside backwards
    update = (flops["update"] + again * flops["rollout"]) / (machine.update_share * machine.flops)
    rollout = flops["rollout"] / (machine.rollout_share * machine.flops)
    generator = max(rollout + update, micro_batches * len(model.layers) * machine.host_seconds)
    pixels = side**2 * schedule.images
    completion = machine.decode_seconds + machine.reward_seconds
    rewards = pixels * (machine.encode_seconds + schedule.group_size * completion)
    shards = _trained(model.parameters(), shard) // shard
    # reads and writes 28 bytes a parameter, and 12 more for the norm of the gradient and its scale
    optimizer = 40 * shards / machine.bandwidth
    per_host = ranks // hosts
    spread = math.ceil(shard / per_host)  # hosts of the ranks that share a copy
    copies = ranks // shard
    seconds = [
        _seconds(traffic.gathered, shard, spread, per_host, machine),
        _seconds(traffic.reduced, shard, spread, per_host, machine),
        # a reduction and a gather; the ranks of a host send different shards, each over its own card
        2 * traffic.averaged * (copies - 1) / copies / (machine.network if hosts > 1 else machine.gpu_link),
    ]
    latency = traffic.collectives * machine.latency * math.log2(max(shard, copies, 2))
    last_backward = update / micro_batches * 2 / 3
    waiting = max(0.0, seconds[0] + latency - generator) + max(0.0, seconds[1] + seconds[2] - last_backward)
    return StepSeconds(generator, rewards, optimizer, waiting if ranks > 1 else 0.0), traffic


def _seconds(size: int, ranks: int, hosts: int, per_host: int, machine: Machine) -> float:
    """Of all-gathers or reduce-scatters of so many bytes."""
    inside = size * (ranks - 1) / ranks / machine.gpu_link
    between = size * (hosts - 1) / hosts / (min(ranks, per_host) * machine.network)
    return max(inside, between)
