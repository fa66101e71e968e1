"""Bytes of a sharded model on one rank: what `parallelize` and AdamW allocate, computed from the shapes alone."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from grpo.config import Parallel, Training
from grpo.parallel import mixed_precision_policy
from grpo.parallel.apply import reshards_after_forward

BLOCKS_IN_FLIGHT = 2  # the one that is computed, and the one that is gathered meanwhile


@dataclass(frozen=True)
class ShardedBytes:
    """Bytes on the rank that has the largest shards."""

    parameters: int
    """Shards of the fp32 weights."""
    gradients: int
    """Shards of their gradients, from the first reduction to the optimizer step."""
    optimizer: int
    """Shards of AdamW's moments."""
    unreduced: int = 0
    """Gradients of the whole model that wait for a deferred reduction."""
    gathered: int = 0
    """Whole parameters in the dtype of the computation, in a training step: the root's, and two blocks' or all."""
    gathered_whole: int = 0
    """The same in a rollout that samples token by token: all parameters."""
    reduction: int = 0
    """A block's whole gradient, and the buffer in which it is reduced."""


def sharded_bytes(
    model: nn.Module, *, mesh: tuple[int, ...], parallel: Parallel, training: Training, accumulates: bool
) -> ShardedBytes:
    """What a trained model takes on one rank, after `parallelize`.

    Each parameter is cut along its first dimension into pieces of equal size; the last ones may be padding.

    Args:
        model: blocks in `model.layers`; may be on the meta device, and is not yet parallelized.
        mesh: see `mesh_shape`; the last size is that of the ranks that share one copy of the model.
        parallel: for its reshard and gradient sync policies.
        training: for its precisions.
        accumulates: an optimizer step has more than one micro-batch.
    """
    pieces = [math.ceil(len(p) / mesh[-1]) * math.prod(p.shape[1:]) for p in model.parameters()]
    shards = torch.float32.itemsize * sum(pieces)
    policy = mixed_precision_policy(training.mixed_precision, training.grad_precision)
    if math.prod(mesh) == 1 and policy.param_dtype is None:
        return ShardedBytes(shards, shards, 2 * shards)
    element, reduced = (policy.param_dtype or torch.float32).itemsize, policy.reduce_dtype.itemsize
    whole, blocks = count_parameters(model), [count_parameters(block) for block in model.layers]
    root, largest = whole - sum(blocks), max(blocks)
    held = min(BLOCKS_IN_FLIGHT, len(blocks)) * largest if reshards_after_forward(parallel) else sum(blocks)
    return ShardedBytes(
        parameters=shards,
        gradients=shards,
        optimizer=2 * shards,
        unreduced=reduced * whole if accumulates and parallel.defer_gradient_sync else 0,
        gathered=element * (root + held),
        gathered_whole=element * whole,
        reduction=(element + reduced) * max(largest, root),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())
