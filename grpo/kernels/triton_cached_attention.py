"""Triton kernel of `cached_attention`: one program for each split of the cache, query head and sequence.

A split is one tile of the cache, which a program reads at once. Each program leaves its split's largest score, sum of
weights and weighted values, then counts itself as arrived. The one that finds all the others of its head arrived merges
them in the order of the splits: one launch, and bits that depend on nothing but the sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.dispatch import arrivals


@triton.jit
def cached_attention_kernel(
    qkv_ptr, keys_ptr, values_ptr, row_ptr, rotary_ptr, weight_ptr, partial_ptr, arrivals_ptr, out_ptr,
    stride_qkv, keys_sequence, keys_head, keys_row, values_sequence, values_head, values_row, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, TILE_SPLITS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.load(row_ptr)
    last = (row // TILE).to(tl.int32)
    if split > last:
        return

    # The filled part of the tile, as it lies in memory until it is used: registers bound how many programs run at once.
    d = tl.arange(0, TILE_D)
    rows = split * TILE + tl.arange(0, TILE)
    inside = d < D
    filled = (rows < row)[:, None] & inside[None, :]
    kv_head = head // GROUP
    key_row_ptr = keys_ptr + sequence * keys_sequence + kv_head * keys_head
    value_row_ptr = values_ptr + sequence * values_sequence + kv_head * values_head
    keys = tl.load(key_row_ptr + rows[:, None] * keys_row + d[None, :], mask=filled, other=0.0)
    values = tl.load(value_row_ptr + rows[:, None] * values_row + d[None, :], mask=filled, other=0.0)

    # The new row: its query and key turned, and rounded as the cache is.
    dtype = keys_ptr.dtype.element_ty
    new_ptr = qkv_ptr + sequence * stride_qkv
    angle_ptr = rotary_ptr + row * D + d - d % 2
    cos = tl.load(angle_ptr, mask=inside, other=0.0)
    sin = tl.load(angle_ptr + 1, mask=inside, other=0.0)
    sin = tl.where(d % 2 == 0, -sin, sin)
    partner = d + 1 - 2 * (d % 2)  # the other of its pair
    query = tl.load(new_ptr + head * D + d, mask=inside, other=0.0).to(tl.float32) * cos
    query += tl.load(new_ptr + head * D + partner, mask=inside, other=0.0).to(tl.float32) * sin
    query = query.to(dtype).to(tl.float32)
    new_key_ptr = new_ptr + (H + kv_head) * D
    new_key = tl.load(new_key_ptr + d, mask=inside, other=0.0).to(tl.float32) * cos
    new_key += tl.load(new_key_ptr + partner, mask=inside, other=0.0).to(tl.float32) * sin
    new_key = new_key.to(dtype)
    new_value = tl.load(new_ptr + (H + H // GROUP + kv_head) * D + d, mask=inside, other=0.0)
    if (split == last) & (head % GROUP == 0):
        tl.store(key_row_ptr + row * keys_row + d, new_key, mask=inside)
        tl.store(value_row_ptr + row * values_row + d, new_value, mask=inside)

    # Row `row` is the last split's, and comes from the new key and value: nobody waits for it to be written.
    scores = tl.sum(keys.to(tl.float32) * query[None, :], axis=1) * scale
    if HAS_WEIGHT:
        scores += tl.where(rows == 0, tl.log(tl.load(weight_ptr + sequence)), 0.0)
    scores = tl.where(rows < row, scores, float("-inf"))
    new_score = tl.sum(new_key.to(tl.float32) * query, axis=0) * scale
    new_score = tl.where(split == last, new_score, float("-inf"))
    peak = tl.maximum(tl.max(scores, axis=0), new_score)
    weights = tl.exp(scores - peak)  # every split up to `last` has a row, so the peak is finite
    new_weight = tl.exp(new_score - peak)
    total = tl.sum(weights, axis=0) + new_weight
    attended = tl.sum(values.to(tl.float32) * weights[:, None], axis=0) + new_weight * new_value.to(tl.float32)

    head_index = sequence * H + head
    head_out_ptr = out_ptr + head_index * D
    if last == 0:
        tl.store(head_out_ptr + d, (attended / total).to(dtype), mask=inside)
        return
    head_partial_ptr = partial_ptr + head_index * SPLITS * (TILE_D + 2)
    part_ptr = head_partial_ptr + split * (TILE_D + 2)
    tl.store(part_ptr + d, attended)
    tl.store(part_ptr + TILE_D, peak)
    tl.store(part_ptr + TILE_D + 1, total)
    tl.debug_barrier()  # the atomic is one thread's: its release covers what the others stored before the barrier
    arrived = tl.atomic_add(arrivals_ptr + head_index, 1, sem="acq_rel", scope="gpu")
    if arrived == last:
        splits = tl.arange(0, TILE_SPLITS)
        there = splits <= last
        parts_ptr = head_partial_ptr + splits * (TILE_D + 2)
        # Read past the first-level cache, which other programs' stores do not reach.
        peaks = tl.load(parts_ptr + TILE_D, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(parts_ptr + TILE_D + 1, mask=there, other=0.0, cache_modifier=".cg")
        parts = tl.load(parts_ptr[:, None] + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
        shrink = tl.exp(peaks - tl.max(peaks, axis=0))
        merged = tl.sum(parts * shrink[:, None], axis=0) / tl.sum(totals * shrink, axis=0)
        tl.store(head_out_ptr + d, merged.to(dtype), mask=inside)
        tl.store(arrivals_ptr + head_index, 0)  # for the next launch


def launch(
    qkv: Tensor, keys: Tensor, values: Tensor, row: Tensor, rotary: Tensor, first_weight: Tensor | None
) -> Tensor:
    """`cached_attention` on checked inputs."""
    B, n_kv_head, length, head_dim = keys.shape
    n_head = qkv.shape[1] // head_dim - 2 * n_kv_head
    options = kernel_options(n_head, n_kv_head, head_dim, length, first_weight is not None)
    out = qkv.new_empty(B, n_head * head_dim)
    if not B:
        return out
    splits = options["SPLITS"]
    partial = qkv.new_empty(B * n_head * splits * (options["TILE_D"] + 2), dtype=torch.float32)
    cached_attention_kernel[(splits, n_head, B)](
        qkv, keys, values, row, rotary, rotary if first_weight is None else first_weight, partial,
        arrivals(qkv.device, B * n_head), out,
        qkv.stride(0), *keys.stride()[:3], *values.stride()[:3], head_dim**-0.5,
        **options,
    )  # fmt: skip
    return out


def kernel_options(n_head: int, n_kv_head: int, head_dim: int, length: int, has_weight: bool) -> dict:
    """Compile-time options of the kernel, as the launcher and the compile tests use them."""
    tile_d = max(16, triton.next_power_of_2(head_dim))
    blocks = block_sizes("cached_attention", head_dim)
    tile = blocks["TILE"]
    splits = triton.cdiv(length, tile)
    tiles = {"TILE_D": tile_d, "TILE": tile, "SPLITS": splits, "TILE_SPLITS": triton.next_power_of_2(splits)}
    sizes = {"H": n_head, "GROUP": n_head // n_kv_head, "D": head_dim, "HAS_WEIGHT": has_weight}
    return {**sizes, **tiles, "num_warps": blocks["num_warps"], "enable_fp_fusion": True}
