"""The plain-torch reference of `sample_tokens`, also its CPU path."""

import math

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo.kernels.dispatch import accumulation_dtype
from grpo.kernels.philox import BLOCK, draw_noise

# Elements of logits worked on at once: about the second-level cache of a CPU core, and enough to fill a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}


def sample_rows(
    logits: Tensor,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor,
    noise: Tensor | None,
    num_samples: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, log_probs, kept_log_probs [N, num_samples] and kept_mass [N]; see `sample_tokens`."""
    N, V = logits.shape
    dtype = accumulation_dtype(logits)
    tokens = logits.new_empty(N, num_samples, dtype=torch.int64)
    log_probs = logits.new_empty(N, num_samples, dtype=dtype)
    kept_log_probs = torch.empty_like(log_probs)
    kept_mass = logits.new_empty(N, dtype=dtype)
    num_rows = max(1, _CHUNK_ELEMENTS.get(logits.device.type, 1 << 21) // V)
    for start in range(0, N, num_rows):
        rows = slice(start, start + num_rows)
        scores, flags = _tempered(logits[rows].to(dtype), temperature)
        peak = scores.amax(1, keepdim=True)
        weights = (scores - peak).exp_()  # [n, V]
        mass = block_mass = _block_sums(weights)  # [n, blocks]
        if top_k or top_p < 1:
            keep = kept_columns(scores, peak, top_k, top_p)
            scores = scores.masked_fill(~keep, -math.inf)
            block_mass = _block_sums(weights.mul_(keep))
        if noise is None:
            column_noise, block_noise = draw_noise(
                seed, step, row_ids[rows], num_samples=num_samples, num_blocks=mass.shape[1]
            )
            tokens[rows] = _draw(scores, block_mass, column_noise, block_noise)
        else:
            tokens[rows] = (scores[:, None] + noise[rows]).argmax(-1)
        total, kept = mass.sum(1, keepdim=True), block_mass.sum(1, keepdim=True)
        chosen = scores.gather(1, tokens[rows]).sub_(peak)
        log_probs[rows] = chosen - total.log() + flags
        kept_log_probs[rows] = chosen - kept.log() + flags
        kept_mass[rows] = (kept / total + flags)[:, 0]
    return tokens, log_probs, kept_log_probs, kept_mass


def _tempered(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits / temperature with -inf for NaN and +inf, and [n, 1] flags: NaN for rows that held one, else 0."""
    scores = logits if temperature == 1 else logits / temperature
    peak = scores.amax(1, keepdim=True)
    flags = peak - peak  # NaN for a peak that is NaN or infinite
    if logits.device.type == "cpu" and not flags.any():
        return scores, flags
    scores = scores.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    empty = scores.amax(1, keepdim=True) == -math.inf
    first = torch.arange(scores.shape[1], device=scores.device) == 0
    return scores.masked_fill_(empty & first, 0), flags


def kept_columns(scores: Tensor, peak: Tensor, top_k: int, top_p: float) -> Tensor:
    """Mask [n, V] of the columns that top-k (0: off), then top-p (1: off) keep. `peak` [n, 1]: largest of each row."""
    if top_k:
        kth = scores.topk(top_k, dim=1).values[:, -1:]
        survives = scores >= kth
        if top_p >= 1:
            return survives
        scores = scores.masked_fill(~survives, -math.inf)
    descending = _descending(scores)
    weights = (descending - peak).exp_()
    prefix = weights.cumsum(1)
    # Exclusive sums ascend, so the columns that stay are a prefix of the order.
    count = (prefix[:, :-1] <= top_p * prefix[:, -1:]).sum(1, keepdim=True) + 1
    edge = descending.gather(1, count - 1)
    above = scores > edge
    equal = scores == edge
    room = count - above.sum(1, keepdim=True)
    if scores.device.type == "cpu" and bool((equal.sum(1, keepdim=True) == room).all()):
        return above.logical_or_(equal)
    return above | equal & (equal.cumsum(1) <= room)


def _descending(scores: Tensor) -> Tensor:
    """Rows sorted from high to low. NumPy sorts fp32 on a CPU some twenty times faster than torch does."""
    if scores.device.type == "cpu":
        return torch.from_numpy(numpy.sort(scores.numpy(), axis=1)).flip(1)
    return scores.sort(dim=1, descending=True).values


def _block_sums(weights: Tensor) -> Tensor:
    """Sums over blocks of columns: [n, V] -> [n, ceil(V / BLOCK)]."""
    return pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).sum(-1)


def _draw(scores: Tensor, block_mass: Tensor, column_noise: Tensor, block_noise: Tensor) -> Tensor:
    """Tokens [n, num_samples] of the two-level Gumbel-max over the finite scores [n, V]."""
    block = (block_mass.log()[:, None] + block_noise).argmax(-1, keepdim=True)  # [n, num_samples, 1]
    columns = torch.arange(BLOCK, device=scores.device) + block * BLOCK
    last = scores.shape[1] - 1
    chosen = scores[:, None].expand(-1, block.shape[1], -1).gather(2, columns.clamp(max=last))
    chosen = chosen.add_(column_noise).masked_fill_(columns > last, -math.inf)
    return (chosen.argmax(-1, keepdim=True) + block * BLOCK).squeeze(-1)
