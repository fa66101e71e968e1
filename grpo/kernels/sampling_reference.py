"""The plain-torch reference of `sample_tokens`, also its CPU path."""

import math

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo.kernels.dispatch import accumulation_dtype
from grpo.kernels.philox import BLOCK, draw_noise
from grpo.kernels.row_math import cached_rows, row_chunks


def sample_rows(
    logits: Tensor, seed: Tensor, step: Tensor, row_ids: Tensor, noise: Tensor | None,
    num_samples: int, temperature: float, top_k: int, top_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """tokens, log_probs, kept_log_probs [N, num_samples] and kept_mass [N]; see `sample_tokens`."""
    (N, V), dtype = logits.shape, accumulation_dtype(logits)
    tokens, log_probs, kept_log_probs, kept_mass = outputs = new_sample(logits, num_samples)
    num_rows = min(max(1, N), cached_rows(logits))
    buffer = logits.new_empty(num_rows, V, dtype=dtype)
    for rows in row_chunks(N, num_rows):
        scores, peak, flags = _tempered(logits[rows].to(dtype), temperature)
        weights = torch.sub(scores, peak, out=buffer[: scores.shape[0]]).exp_()  # [n, V]
        mass = block_mass = _block_sums(weights)  # [n, blocks]
        if top_k or top_p < 1:
            keep = kept_columns(scores, peak, top_k, top_p)
            scores = scores.masked_fill(~keep, -math.inf)
            block_mass = _block_sums(weights.mul_(keep))
        if noise is None:
            noises = draw_noise(seed, step, row_ids[rows], num_samples, mass.shape[1])
            tokens[rows] = _draw(scores, block_mass, *noises)
        else:
            tokens[rows] = (scores[:, None] + noise[rows]).argmax(-1)
        total, kept = mass.sum(1, keepdim=True), block_mass.sum(1, keepdim=True)
        chosen = scores.gather(1, tokens[rows]).sub_(peak)
        log_probs[rows] = chosen - total.log() + flags
        kept_log_probs[rows] = chosen - kept.log() + flags
        kept_mass[rows] = (kept / total + flags)[:, 0]
    return outputs


def new_sample(logits: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised tokens, log_probs, kept_log_probs [N, num_samples] and kept_mass [N] for logits [N, V]."""
    shape, dtype = (logits.shape[0], num_samples), accumulation_dtype(logits)
    log_probs, kept_log_probs, kept_mass = (logits.new_empty(size, dtype=dtype) for size in (shape, shape, shape[:1]))
    return logits.new_empty(shape, dtype=torch.int64), log_probs, kept_log_probs, kept_mass


def _tempered(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits / temperature with -inf for NaN and +inf, its row maxima, and flags: NaN for rows that held one, else 0.

    Maxima and flags are [n, 1]. In a row without any finite value the first column becomes 0.
    """
    scores = logits if temperature == 1 else logits / temperature
    peak = scores.amax(1, keepdim=True)
    flags = peak - peak  # NaN for a peak that is NaN or infinite
    if logits.device.type == "cpu" and not flags.any():
        return scores, peak, flags
    scores = scores.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    empty = scores.amax(1, keepdim=True) == -math.inf
    first = torch.arange(scores.shape[1], device=scores.device) == 0
    scores.masked_fill_(empty & first, 0)
    return scores, scores.amax(1, keepdim=True), flags


def kept_columns(scores: Tensor, peak: Tensor, top_k: int, top_p: float) -> Tensor:
    """Mask [n, V] of the columns that top-k (0: off), then top-p (1: off) keep. `peak` [n, 1]: largest of each row."""
    descending = _descending(scores)
    survives = None
    if top_k:
        kth = descending[:, top_k - 1 : top_k]
        if top_p >= 1:
            return scores >= kth
        survives = descending >= kth
    weights = (descending - peak).exp_()
    prefix = (weights if survives is None else weights.mul_(survives)).cumsum(1)
    # Exclusive sums ascend, so the columns that stay are a prefix of the order.
    stays = prefix[:, :-1] <= top_p * prefix[:, -1:]
    count = (stays if survives is None else stays.logical_and_(survives[:, 1:])).sum(1, keepdim=True) + 1
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
    padding = -weights.shape[1] % BLOCK
    weights = pad(weights, (0, padding)) if padding else weights
    return weights.unflatten(1, (-1, BLOCK)).sum(-1)


def _draw(scores: Tensor, block_mass: Tensor, column_noise: Tensor, block_noise: Tensor) -> Tensor:
    """Tokens [n, num_samples] of the two-level Gumbel-max over the finite scores [n, V]."""
    block = (block_mass.log()[:, None] + block_noise).argmax(-1, keepdim=True)  # [n, num_samples, 1]
    columns = torch.arange(BLOCK, device=scores.device) + block * BLOCK
    last = scores.shape[1] - 1
    chosen = scores[:, None].expand(-1, block.shape[1], -1).gather(2, columns.clamp(max=last))
    chosen = chosen.add_(column_noise).masked_fill_(columns > last, -math.inf)
    return (chosen.argmax(-1, keepdim=True) + block * BLOCK).squeeze(-1)
