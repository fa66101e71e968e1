"""Bytes of a sharded model on one rank: what `parallelize` and AdamW allocate, computed from the shapes alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from grpo.config.sections import Optimizer, Parallel, Training
from grpo.parallel.apply import reshards_after_forward
from grpo.parallel.precision import mixed_precision_policy

_FP32 = 4
_BLOCKS_IN_FLIGHT = 2  # the one that is computed, and the one that is gathered meanwhile


@dataclass(frozen=True)
class ShardedBytes:
    """Bytes on the rank that has the largest shards."""

    parameters: int
    """Shards of the fp32 weights."""
    gradients: int
    """Shards of their gradients, from the first reduction to the optimizer step."""
    optimizer: int
    """Shards of AdamW's moments; 0 when they are in host memory."""
    unreduced: int
    """Gradients of the whole model that wait for a deferred reduction."""
    gathered: int
    """Whole parameters in the dtype of the computation, in a training step: the root's, and two blocks' or all."""
    gathered_whole: int
    """The same in a rollout that decodes: all parameters."""
    reduction: int
    """A block's whole gradient, and the buffer in which it is reduced."""


def sharded_bytes(
    model: nn.Module,
    *,
    shard: int,
    ranks: int,
    parallel: Parallel,
    training: Training,
    optimizer: Optimizer | None,
    accumulates: bool,
) -> ShardedBytes:
    """What a model takes on one rank, after `parallelize`.

    Each parameter is cut along its first dimension into `shard` pieces of equal size; the last ones may be padding.

    Args:
        model: blocks in `model.layers`; may be on the meta device, and is not yet parallelized.
        shard: ranks that share one copy of the model.
        ranks: all ranks of the run.
        parallel: for its reshard and gradient sync policies.
        training: for its precisions.
        optimizer: None for a frozen model.
        accumulates: an optimizer step has more than one micro-batch.
    """
    everything = list(model.parameters())
    shards = _FP32 * sum(_shard_elements(parameter, shard) for parameter in everything)
    whole = count_parameters(model)
    policy = mixed_precision_policy(training.mixed_precision, training.grad_precision)
    trained = optimizer is not None
    offloaded = trained and optimizer.cpu_offload
    persistent = {
        "parameters": shards,
        "gradients": shards if trained else 0,
        "optimizer": 2 * shards if trained and not offloaded else 0,
    }
    if ranks == 1 and policy.param_dtype is None:
        return ShardedBytes(**persistent, unreduced=0, gathered=0, gathered_whole=0, reduction=0)
    element = (policy.param_dtype or torch.float32).itemsize
    blocks = [count_parameters(block) for block in model.layers]
    largest, root = max(blocks), whole - sum(blocks)
    held = min(_BLOCKS_IN_FLIGHT, len(blocks)) * largest if reshards_after_forward(parallel) else sum(blocks)
    reduced = policy.reduce_dtype.itemsize
    return ShardedBytes(
        **persistent,
        unreduced=reduced * whole if trained and accumulates and parallel.defer_gradient_sync else 0,
        gathered=element * (root + held),
        gathered_whole=element * whole,
        reduction=(element + reduced) * max(largest, root) if trained else 0,
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trained or not."""
    return _count(model.parameters())


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _shard_elements(parameter: nn.Parameter, shard: int) -> int:
    """Elements of one rank's piece, padding included."""
    return math.ceil(parameter.shape[0] / shard) * math.prod(parameter.shape[1:])
