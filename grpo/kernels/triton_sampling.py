"""Triton kernel of `sample_tokens`: one program holds one row in registers.

Same definitions as `sampling_reference.py` and the same noise as `philox.py`; tokens differ from the reference's only
where two scores, or a prefix sum and p, lie within rounding of one another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.dispatch import has_ex2
from grpo.kernels.philox import BLOCK
from grpo.kernels.sampling_reference import new_sample
from grpo.kernels.triton_log_probs import LOG2_E, power_of_two

_BLOCK = tl.constexpr(BLOCK)
_GROUPS = tl.constexpr(BLOCK // 4)
_MOST_AT_ONCE = 16  # samples: more would spill registers


@triton.jit
def _order_key(value):
    """Integer that orders like the finite or infinite fp32 `value`; its inverse is `_from_key`."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _total(tile):
    """Sum of a whole tile. In one reduction: two nested ones exchange lanes for every row of the tile."""
    return tl.sum(tile, axis=None)


@triton.jit
def _count(mask):
    """Number of true entries. Sums of fp32 are exact here; LLVM packs those of booleans through local memory."""
    return _total(tl.where(mask, 1.0, 0.0)).to(tl.int32)


@triton.jit
def _temper(logits, temperature, HEAT: tl.constexpr):
    """logits / temperature in fp32."""
    scores = logits.to(tl.float32)
    if HEAT:
        scores = tl.div_rn(scores, temperature)
    return scores


@triton.jit
def _drawable(scores):
    """scores with -inf for NaN and +inf."""
    return tl.where(scores < float("inf"), scores, float("-inf"))


@triton.jit
def _gumbel(bits):
    """Standard Gumbel noise of uint32 words; a series stands in for log1p where u is small."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = u * (1 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1 - u)))


@triton.jit
def _exp(x, EX2: tl.constexpr):
    """exp(x), as Triton computes it but for results below 2 ** -126, which are 0 with EX2."""
    if EX2:
        return power_of_two(x * LOG2_E, EX2)
    return tl.exp(x)


@triton.jit
def _mass(scores, keep, peak, EX2: tl.constexpr):
    """exp(scores - peak) where `keep`, else 0.

    Selecting before the exponential keeps the compiler from hoisting it out of a loop, and the row from being held in
    registers twice.
    """
    return _exp(tl.where(keep, scores, float("-inf")) - peak, EX2)


@triton.jit
def _top_k_threshold(scores, peak, k):
    """Largest t with at least k scores >= t, by bisection on the order of the bits: exact, at most 32 passes."""
    low = _order_key(peak * 0 + float("-inf"))
    high = _order_key(peak)
    while low < high:
        middle = high - ((high - low).to(tl.uint32, bitcast=True) >> 1).to(tl.int32, bitcast=True)
        count = _count(scores >= _from_key(middle))
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
    return _from_key(low)


@triton.jit
def _top_p_threshold(scores, peak, low, limit, EX2: tl.constexpr):
    """Smallest t >= low with at most `limit` of mass above t."""
    low = _order_key(low)
    high = _order_key(peak)
    while low < high:
        middle = low + ((high - low).to(tl.uint32, bitcast=True) >> 1).to(tl.int32, bitcast=True)
        above = _total(_mass(scores, scores > _from_key(middle), peak, EX2))
        high = tl.where(above <= limit, middle, high)
        low = tl.where(above <= limit, low, middle + 1)
    return _from_key(low)


@triton.jit
def _last_tie(scores, columns, threshold, room, V):
    """Column of the `room`-th score equal to `threshold`."""
    low = room * 0
    high = low + V - 1
    while low < high:
        middle = (low + high) // 2
        count = _count((scores == threshold) & (columns <= middle))
        high = tl.where(count >= room, middle, high)
        low = tl.where(count >= room, low, middle + 1)
    return low


@triton.jit
def _truncation(
    scores, columns, peak, top_k, top_p, V, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, EX2: tl.constexpr
):
    """(threshold, last_tie): kept are the scores above the threshold, and those equal to it up to column last_tie."""
    threshold = peak * 0 + float("-inf")
    last_tie = tl.full((), V, tl.int32)
    if HAS_TOP_K:
        threshold = _top_k_threshold(scores, peak, top_k)
    if HAS_TOP_P:
        limit = top_p * _total(_mass(scores, scores >= threshold, peak, EX2))
        threshold = _top_p_threshold(scores, peak, threshold, limit, EX2)
        above = _total(_mass(scores, scores > threshold, peak, EX2))
        ties = _count(scores == threshold)
        each = _exp(threshold - peak, EX2)
        room = tl.where(each > 0, tl.minimum(tl.floor((limit - above) / each) + 1, ties.to(tl.float32)), ties)
        room = tl.maximum(room.to(tl.int32), 1)
        if room < ties:
            last_tie = _last_tie(scores, columns, threshold, room, V)
    return threshold, last_tie


@triton.jit
def _draw_flat(scores, columns, kept, noise_ptr, tokens_ptr, V: tl.constexpr, NUM_SAMPLES: tl.constexpr):
    """argmax(scores + noise) over the kept columns, one sample after the other."""
    for sample in range(NUM_SAMPLES):
        noise = tl.load(noise_ptr + sample * V + columns, mask=columns < V, other=0.0)
        noisy = tl.where(kept & (columns < V), scores + noise, float("-inf"))
        best = tl.max(noisy, axis=None)
        first = tl.where((noisy == best) & (columns < V), columns, V)
        tl.store(tokens_ptr + sample, tl.min(first, axis=None).to(tl.int64))


@triton.jit
def _argmax4(s0, s1, s2, s3, lane_stride):
    """Lowest index of the maximum along axis 1 of four tiles; tile i holds the indices from i * lane_stride on."""
    best = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), axis=1)[:, None]
    index = tl.arange(0, s0.shape[1])[None, :]
    far = 0x7FFFFFFF
    i0 = tl.where(s0 == best, index, far)
    i1 = tl.where(s1 == best, index + lane_stride, far)
    i2 = tl.where(s2 == best, index + 2 * lane_stride, far)
    i3 = tl.where(s3 == best, index + 3 * lane_stride, far)
    return tl.min(tl.minimum(tl.minimum(i0, i1), tl.minimum(i2, i3)), axis=1)


@triton.jit
def _block_score(mass_ptr, bits, group, lane, groups, num_blocks):
    block = lane * groups + group
    mass = tl.load(mass_ptr + block, mask=(group < groups) & (block < num_blocks), other=0.0)
    return tl.log(mass) + _gumbel(bits)


@triton.jit
def _column_score(row_ptr, bits, column, temperature, least_first, threshold, last_tie, V, HEAT: tl.constexpr):
    logits = tl.load(row_ptr + column, mask=column < V, other=float("-inf"))
    scores = _drawable(_temper(logits, temperature, HEAT))
    scores = tl.where(column == 0, tl.maximum(scores, least_first), scores)
    kept = (scores > threshold) | ((scores == threshold) & (column <= last_tie))
    return tl.where(kept, scores + _gumbel(bits), float("-inf"))


@triton.jit
def _draw_two_level(
    row_ptr, mass_ptr, seed_ptr, step_ptr, row_id_ptr,
    temperature, least_first, threshold, last_tie, samples,
    V: tl.constexpr, TILE_GROUPS: tl.constexpr, HEAT: tl.constexpr,
):  # fmt: skip
    """A token for each of `samples`: a block by its kept mass, then a kept column of it."""
    sample = samples[:, None]
    seed = tl.load(seed_ptr)
    step = tl.load(step_ptr).to(tl.uint32)
    row_id = tl.load(row_id_ptr)
    row_low, row_high = row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32)

    num_blocks: tl.constexpr = (V + _BLOCK - 1) // _BLOCK
    groups: tl.constexpr = (num_blocks + 3) // 4
    group = tl.arange(0, TILE_GROUPS)[None, :]
    b0, b1, b2, b3 = tl.philox(seed, (sample << 20) | (group + _GROUPS), step, row_low, row_high)
    s0 = _block_score(mass_ptr, b0, group, 0, groups, num_blocks)
    s1 = _block_score(mass_ptr, b1, group, 1, groups, num_blocks)
    s2 = _block_score(mass_ptr, b2, group, 2, groups, num_blocks)
    s3 = _block_score(mass_ptr, b3, group, 3, groups, num_blocks)
    first = _argmax4(s0, s1, s2, s3, groups) * _BLOCK

    group = tl.arange(0, _GROUPS)[None, :]
    b0, b1, b2, b3 = tl.philox(seed, (sample << 20) | group, step, row_low, row_high)
    c0 = first[:, None] + group
    c1, c2, c3 = c0 + _GROUPS, c0 + 2 * _GROUPS, c0 + 3 * _GROUPS
    s0 = _column_score(row_ptr, b0, c0, temperature, least_first, threshold, last_tie, V, HEAT)
    s1 = _column_score(row_ptr, b1, c1, temperature, least_first, threshold, last_tie, V, HEAT)
    s2 = _column_score(row_ptr, b2, c2, temperature, least_first, threshold, last_tie, V, HEAT)
    s3 = _column_score(row_ptr, b3, c3, temperature, least_first, threshold, last_tie, V, HEAT)
    return first + _argmax4(s0, s1, s2, s3, _GROUPS)


@triton.jit
def sample_kernel(
    logits_ptr, seed_ptr, step_ptr, row_ids_ptr, noise_ptr, block_mass_ptr,
    tokens_ptr, log_probs_ptr, kept_log_probs_ptr, kept_mass_ptr,
    stride_row, temperature, top_k, top_p,
    V: tl.constexpr, NUM_SAMPLES: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILE_SAMPLES: tl.constexpr,
    TILE_GROUPS: tl.constexpr, HEAT: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    HAS_NOISE: tl.constexpr, EX2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    columns = tl.arange(0, TILE_BLOCKS)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    scores = _temper(tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")), temperature, HEAT)
    flagged = _count(scores < float("inf")) < TILE_BLOCKS * _BLOCK
    scores = _drawable(scores)
    peak = tl.max(scores, axis=None)
    empty = peak == float("-inf")
    least_first = tl.where(empty, 0.0, float("-inf"))  # a row without any finite score draws its first column
    scores = tl.where(columns == 0, tl.maximum(scores, least_first), scores)
    peak = tl.maximum(peak, least_first)
    flag = tl.where(flagged | empty, float("nan"), 0.0)

    mass = tl.sum(_exp(scores - peak, EX2), axis=1)
    total = tl.sum(mass, axis=0)
    threshold, last_tie = _truncation(scores, columns, peak, top_k, top_p, V, HAS_TOP_K, HAS_TOP_P, EX2)
    kept = (scores > threshold) | ((scores == threshold) & (columns <= last_tie))
    if HAS_TOP_K or HAS_TOP_P:
        mass = tl.sum(_mass(scores, kept, peak, EX2), axis=1)
    kept_total = tl.sum(mass, axis=0)
    tl.store(kept_mass_ptr + row, kept_total / total + flag)

    if HAS_NOISE:
        first = row * NUM_SAMPLES
        _draw_flat(scores, columns, kept, noise_ptr + first * V, tokens_ptr + first, V, NUM_SAMPLES)
    else:
        # Every thread needs the mass of every block: handed over in memory, where the cache holds it.
        num_blocks: tl.constexpr = (V + _BLOCK - 1) // _BLOCK
        blocks = tl.arange(0, TILE_BLOCKS)
        tl.store(block_mass_ptr + row * num_blocks + blocks, mass, mask=blocks < num_blocks)
    tl.debug_barrier()
    for start in range(0, NUM_SAMPLES, TILE_SAMPLES):
        samples = start + tl.arange(0, TILE_SAMPLES)
        valid = samples < NUM_SAMPLES
        outputs = row * NUM_SAMPLES + samples
        if HAS_NOISE:
            tokens = tl.load(tokens_ptr + outputs, mask=valid, other=0)
        else:
            mass_ptr = block_mass_ptr + row * ((V + _BLOCK - 1) // _BLOCK)
            tokens = _draw_two_level(
                row_ptr, mass_ptr, seed_ptr, step_ptr, row_ids_ptr + row, temperature, least_first, threshold,
                last_tie, samples, V, TILE_GROUPS, HEAT,
            ).to(tl.int64)  # fmt: skip
            tl.store(tokens_ptr + outputs, tokens, mask=valid)
        chosen = _drawable(_temper(tl.load(row_ptr + tokens), temperature, HEAT))
        relative = tl.maximum(chosen, least_first) - peak + flag
        tl.store(log_probs_ptr + outputs, relative - tl.log(total), mask=valid)
        tl.store(kept_log_probs_ptr + outputs, relative - tl.log(kept_total), mask=valid)


def launch(
    logits: Tensor, seed: Tensor, step: Tensor, row_ids: Tensor, noise: Tensor | None,
    num_samples: int, temperature: float, top_k: int, top_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """tokens, log_probs, kept_log_probs [N, num_samples] and kept_mass [N]; see `sample_tokens`."""
    N, V = logits.shape
    outputs = new_sample(logits, num_samples)
    block_mass = logits.new_empty(N, triton.cdiv(V, BLOCK), dtype=torch.float32)
    if N:
        noise_or_any = block_mass if noise is None else noise.contiguous()
        sample_kernel[(N,)](
            logits, seed, step, row_ids.contiguous(), noise_or_any, block_mass, *outputs,
            logits.stride(0), temperature, top_k, top_p, V=V, HAS_NOISE=noise is not None,
            **kernel_options(V, num_samples, temperature, top_k, top_p),
        )  # fmt: skip
    return outputs


def kernel_options(V: int, num_samples: int, temperature: float, top_k: int, top_p: float) -> dict:
    """Compile-time options of `sample_kernel`, as the launcher and the compile tests use them."""
    num_blocks, power = triton.cdiv(V, BLOCK), triton.next_power_of_2
    tiles = {"TILE_BLOCKS": power(num_blocks), "TILE_SAMPLES": min(power(num_samples), _MOST_AT_ONCE)}
    tiles["TILE_GROUPS"] = power(triton.cdiv(num_blocks, 4))
    flags = {"HEAT": temperature != 1, "HAS_TOP_K": top_k > 0, "HAS_TOP_P": top_p < 1, "EX2": has_ex2()}
    sizes = block_sizes("sample_truncated" if top_k > 0 or top_p < 1 else "sample", V)
    # Without fusion: the reference rounds after every operation.
    return {"NUM_SAMPLES": num_samples, **tiles, **flags, **sizes, "enable_fp_fusion": False}
