"""Triton kernel of `clipped_ratio_loss`: every token once; the program that ends last adds what the others left.

Each program leaves the sums of its own tokens, then counts itself as arrived. The one that finds all the others arrived
adds the sums up in the order of the programs, whichever it is: one launch, and the same bits from run to run.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.ratio_reference import LOG_RATIO_LIMIT, METRICS, log_bounds

_TILE_PROGRAMS = 128
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
_SUMS = tl.constexpr(len(METRICS))
_TILE_SUMS = tl.constexpr(triton.next_power_of_2(len(METRICS)))
_STRIDED = ("log_probs", "old", "advantages", "weights", "ref", "gradient")
_STRIDES = [f"{name}_{axis}" for name in _STRIDED for axis in range(3)]
_NAN = tl.constexpr(tl.PropagateNan.ALL)  # of a minimum or maximum: a NaN log-prob must reach the loss


@triton.jit
def _clamp(values, lowest, highest):
    return tl.minimum(tl.maximum(values, lowest, propagate_nan=_NAN), highest, propagate_nan=_NAN)


@triton.jit
def _clamped_exp(exponent):
    """The exponent clamped, its exponential, and where the clamp changes nothing."""
    clamped = _clamp(exponent, -_LIMIT, _LIMIT)
    return clamped, tl.exp(clamped), clamped == exponent


@triton.jit
def _kl_estimate(difference, KL: tl.constexpr):
    """Estimate of KL(policy || reference) from log p_ref - log p, and its derivative with respect to log p."""
    if KL == "k1":
        return -difference, difference * 0 + 1
    elif KL == "k2":
        return difference * difference / 2, -difference
    else:
        _, exponential, inside = _clamped_exp(difference)
        return exponential - difference - 1, 1 - exponential * tl.where(inside, 1.0, 0.0)


@triton.jit
def _offset(i0, i1, i2, s0, s1, s2):
    return i0.to(tl.int64) * s0 + i1.to(tl.int64) * s1 + i2.to(tl.int64) * s2


@triton.jit
def _leave(partial_ptr, index: tl.constexpr, values):
    """Stores this program's sum of `values`; partial sums are [programs, METRICS]."""
    tl.store(partial_ptr + tl.program_id(0) * _SUMS + index, tl.sum(values, axis=0))


@triton.jit
def _add_up(partial_ptr, sums_ptr, loss_ptr, TILE_PROGRAMS: tl.constexpr):
    """The sums over all programs, and the loss: the first two of them together."""
    index = tl.arange(0, _TILE_SUMS)[None, :]
    program = tl.arange(0, TILE_PROGRAMS)[:, None]
    tile = tl.zeros((TILE_PROGRAMS, _TILE_SUMS), tl.float32)
    start = 0
    while start < tl.num_programs(0):
        mask = (start + program < tl.num_programs(0)) & (index < _SUMS)
        # From the cache that all multiprocessors share: the one of this multiprocessor may hold older values.
        tile += tl.load(partial_ptr + (start + program) * _SUMS + index, mask=mask, other=0.0, cache_modifier=".cg")
        start += TILE_PROGRAMS
    totals = tl.sum(tile, axis=0)
    index = tl.arange(0, _TILE_SUMS)
    tl.store(sums_ptr + index, totals, mask=index < _SUMS)
    tl.store(loss_ptr, tl.sum(tl.where(index < 2, totals, 0.0), axis=0))


@triton.jit(do_not_specialize=[*_STRIDES, "count", "size_1", "size_2"])
def ratio_loss_kernel(
    log_probs_ptr, old_log_probs_ptr, advantages_ptr, weights_ptr, ref_log_probs_ptr, gradient_ptr,
    partial_ptr, arrivals_ptr, sums_ptr, loss_ptr,
    log_probs_0, log_probs_1, log_probs_2, old_0, old_1, old_2, advantages_0, advantages_1, advantages_2,
    weights_0, weights_1, weights_2, ref_0, ref_1, ref_2, gradient_0, gradient_1, gradient_2,
    count, size_1, size_2, lowest, highest, log_lowest, log_highest, kl_coef,
    KL: tl.constexpr, HAS_REF: tl.constexpr, CLIP: tl.constexpr, TILE: tl.constexpr, TILE_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Every tensor is seen as three-dimensional, by its three strides."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    i2, rest = token % size_2, token // size_2
    i1, i0 = rest % size_1, rest // size_1
    valid = token < count
    weight = tl.load(weights_ptr + _offset(i0, i1, i2, weights_0, weights_1, weights_2), mask=valid, other=0.0)
    counted = weight != 0
    log_p_ptr = log_probs_ptr + _offset(i0, i1, i2, log_probs_0, log_probs_1, log_probs_2)
    log_p = tl.load(log_p_ptr, mask=counted, other=0.0)
    old_log_p = tl.load(old_log_probs_ptr + _offset(i0, i1, i2, old_0, old_1, old_2), mask=counted, other=0.0)
    advantage_ptr = advantages_ptr + _offset(i0, i1, i2, advantages_0, advantages_1, advantages_2)
    advantage = tl.load(advantage_ptr, mask=counted, other=0.0)

    log_ratio, ratio, inside = _clamped_exp(log_p - old_log_p)
    bounded = _clamp(ratio, lowest, highest)
    below = log_ratio < log_lowest
    above = log_ratio > log_highest
    if CLIP:
        clipped_low = below & (advantage < 0)
        clipped_high = above & (advantage > 0)
        policy = -tl.minimum(advantage * ratio, advantage * bounded, propagate_nan=_NAN)
        moves = inside & (clipped_low == 0) & (clipped_high == 0)
        gradient = -advantage * ratio * tl.where(moves, 1.0, 0.0)
    else:
        clipped_low = below
        clipped_high = above
        policy = -bounded * advantage * log_p
        gradient = -bounded * advantage

    divergence = tl.zeros((TILE,), tl.float32)
    if HAS_REF:
        ref_ptr = ref_log_probs_ptr + _offset(i0, i1, i2, ref_0, ref_1, ref_2)
        divergence, d_divergence = _kl_estimate(tl.load(ref_ptr, mask=counted, other=0.0) - log_p, KL)
        gradient += kl_coef * d_divergence
    gradient_ptr += _offset(i0, i1, i2, gradient_0, gradient_1, gradient_2)
    tl.store(gradient_ptr, weight * gradient, mask=valid)

    # The order is that of METRICS. Entries that are not counted have ratio 1 and weight 0.
    one = tl.where(counted, 1.0, 0.0)
    _leave(partial_ptr, 0, weight * policy)
    _leave(partial_ptr, 1, kl_coef * (weight * divergence))
    _leave(partial_ptr, 2, one)
    _leave(partial_ptr, 3, ratio * one)
    _leave(partial_ptr, 4, ratio * ratio * one)
    _leave(partial_ptr, 5, ratio - 1 - log_ratio)
    _leave(partial_ptr, 6, divergence * one)
    _leave(partial_ptr, 7, tl.where(clipped_low & counted, 1.0, 0.0))
    _leave(partial_ptr, 8, tl.where(clipped_high & counted, 1.0, 0.0))
    _leave(partial_ptr, 9, tl.where((below | above) & counted, 1.0, 0.0))

    # Stores and atomics of scalars are those of one thread, the first: its release covers the sums that it stored.
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        _add_up(partial_ptr, sums_ptr, loss_ptr, TILE_PROGRAMS)
        tl.store(arrivals_ptr, 0)  # for the next launch


def launch(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor | None,
    clip_low: float, clip_high: float, kl: str, kl_coef: float, surrogate: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `ratio_loss` of the reference; the gradient has the layout of log_probs."""
    gradient, count = torch.empty_like(log_probs), log_probs.numel()
    if not count:
        return log_probs.new_zeros(()), log_probs.new_zeros(len(METRICS)), gradient
    loss, sums = log_probs.new_empty(()), log_probs.new_empty(len(METRICS))
    options = kernel_options(count, kl, ref is not None, surrogate)
    programs = triton.cdiv(count, options["TILE"])
    constants = (old_log_probs, advantages[..., None].expand_as(log_probs), weights)
    tensors = (log_probs, *constants, log_probs if ref is None else ref, gradient)
    # Along the memory of log_probs, whatever its layout: neighbours in a tile are neighbours there.
    order = sorted(range(3), key=log_probs.stride, reverse=True)
    strides = (tensor.stride(axis) for tensor in tensors for axis in order)
    ratio_loss_kernel[(programs,)](
        *tensors, log_probs.new_empty(programs, len(METRICS)), _arrivals(log_probs.device), sums, loss,
        *strides, count, log_probs.shape[order[1]], log_probs.shape[order[2]],
        1 - clip_low, 1 + clip_high, *log_bounds(clip_low, clip_high), kl_coef, **options,
    )  # fmt: skip
    return loss, sums, gradient


def kernel_options(count: int, kl: str, has_ref: bool, surrogate: str) -> dict:
    """Compile-time options of the kernel, as the launcher and the compile tests use them."""
    constants = {"KL": kl, "HAS_REF": has_ref, "CLIP": surrogate == "clip"}
    sizes = block_sizes("ratio_loss", count)
    return {**constants, **sizes, "TILE_PROGRAMS": _TILE_PROGRAMS, "enable_fp_fusion": False}


_RING = 1 << 15
_counters: dict[torch.device, tuple[Tensor, Iterator[int], Iterator[int]]] = {}


def _arrivals(device: torch.device) -> Tensor:
    """A counter of arrived programs for one launch: 0 before it, and set back to 0 by it.

    Launches on different streams may run at the same time, so each takes the next counter of a ring too long to come
    round while a launch still waits. A counter that a CUDA graph captured stays the graph's, which may run at any time.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _counters and not capturing:
        counters = torch.zeros(2 * _RING, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once: zero before any stream uses them
        _counters[device] = counters, itertools.cycle(range(_RING)), iter(range(_RING, 2 * _RING))
    if device in _counters:
        counters, launches, captures = _counters[device]
        index = next(captures if capturing else launches, None)
        if index is not None:
            return counters[index : index + 1]
    # A graph that has none gets one of its own, which each replay sets to 0 first.
    return torch.zeros(1, dtype=torch.int32, device=device)
