"""Reference arithmetic on chunks of rows of scores, shared by the log-prob ops; scores are logits / temperature.

With p = softmax(scores), lse their log-sum-exp and H = lse - sum_j p_j scores_j, the derivatives are

    d log p_t / d scores_j = onehot(t)_j - p_j            dH / d scores_j = -p_j (log p_j + H)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype, check_temperature

# Elements to pass over at a time. On a CPU, for each thread, about its second-level cache: passes are faster there, and
# smaller pieces would spend their time on waking the threads.
_CPU_ELEMENTS = 1 << 19
_GPU_ELEMENTS = 1 << 27

# Stands in for log 0: its exponential is 0, and 0 times it is 0 where 0 times -inf would be NaN.
_LOG_ZERO = -1e4


class ScoredRows(NamedTuple):
    """What a backward pass knows of N scored rows beside their scores."""

    tokens: Tensor  # [N, M] int64
    lse: Tensor  # [N]
    entropy: Tensor  # [N], or [0] where nobody asked for it
    grad_log_probs: Tensor  # [N, M]
    grad_entropy: Tensor | None  # [N]

    @classmethod
    def of(cls, saved: list[Tensor], grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> "ScoredRows":
        """From (tokens, lse, entropy) and the gradients that autograd hands over, None for an unused output."""
        tokens, lse, entropy = saved
        if grad_log_probs is None:
            grad_log_probs = torch.zeros(tokens.shape, dtype=lse.dtype, device=lse.device)
        grad_entropy = None if grad_entropy is None or not entropy.numel() else grad_entropy.contiguous()
        return cls(tokens, lse, entropy, grad_log_probs.contiguous(), grad_entropy)  # that of a sum is expanded

    def rows(self, rows: slice) -> "ScoredRows":
        """Some of the rows."""
        return ScoredRows(
            self.tokens[rows],
            self.lse[rows],
            self.entropy[rows],
            self.grad_log_probs[rows],
            None if self.grad_entropy is None else self.grad_entropy[rows],
        )


def check_arguments(rows: Tensor, tokens: Tensor, temperature: float) -> None:
    """Refuses rows that are not [N, ...], tokens that are not [N, M] int64, a temperature out of range."""
    if rows.ndim != 2 or tokens.ndim != 2 or tokens.shape[0] != rows.shape[0] or tokens.dtype != torch.int64:
        found = f"{list(rows.shape)} and {list(tokens.shape)} {tokens.dtype}"
        raise ValueError(f"expected rows [N, ...] and tokens [N, M] int64, not {found}")
    check_temperature(temperature)


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Refuses tokens outside 0 .. vocabulary-1 that are on the CPU.

    On a GPU the host would have to wait for the answer. There the kernels give NaN for such a token, in its log-prob
    and in the gradient of its row, and the torch reference stops the device by an assertion.
    """
    if tokens.device.type != "cpu" or not tokens.numel():
        return
    low, high = (bound.item() for bound in tokens.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"tokens must lie in 0 .. {vocabulary - 1}; found {low if low < 0 else high}")


def new_outputs(tokens: Tensor, with_entropy: bool, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised log-probs [N, M], lse [N] and entropy [N] (or [0] where nobody asked for it)."""
    N, M = tokens.shape
    dtype = accumulation_dtype(*inputs)
    entropy = tokens.new_empty(N if with_entropy else 0, dtype=dtype)
    return tokens.new_empty(N, M, dtype=dtype), tokens.new_empty(N, dtype=dtype), entropy


def row_chunks(num_rows: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows, the last one shorter. Of no rows one slice, so that results have their shapes."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, max(1, num_rows), size))


def cached_rows(scores: Tensor) -> int:
    """Rows of scores [n, V] to pass over at a time."""
    elements = _GPU_ELEMENTS if scores.is_cuda else _CPU_ELEMENTS * torch.get_num_threads()
    return max(1, int(elements // scores.shape[1]))


def score_rows(scores: Tensor, tokens: Tensor, log_probs: Tensor, lse: Tensor, entropy: Tensor) -> None:
    """Fills log_probs [n, M], lse [n] and entropy [n] or [0] from scores [n, V], which are overwritten."""
    for rows in row_chunks(scores.shape[0], cached_rows(scores)):
        _score(*(column[rows] for column in (scores, tokens, log_probs, lse, entropy)))


def _score(scores: Tensor, tokens: Tensor, log_probs: Tensor, lse: Tensor, entropy: Tensor) -> None:
    torch.gather(scores, 1, tokens, out=log_probs)
    peak = scores.amax(1, keepdim=True)
    scores.sub_(peak)
    if entropy.numel():
        weights = scores.clamp_(min=_LOG_ZERO).exp()
        total = weights.sum(1)
        mean_score = weights.mul_(scores).sum(1).div_(total)
        torch.sub(total.log(), mean_score, out=entropy)
    else:
        total = scores.exp_().sum(1)
    torch.add(total.log_(), peak[:, 0], out=lse)
    log_probs.sub_(lse[:, None])


def score_rows_backward(scores: Tensor, scored: ScoredRows, temperature: float) -> None:
    """Turns scores [n, V] into the gradient with respect to the logits, in place."""
    grad_entropy = None if scored.grad_entropy is None else scored.grad_entropy / temperature
    scored = scored._replace(grad_log_probs=scored.grad_log_probs / temperature, grad_entropy=grad_entropy)
    for rows in row_chunks(scores.shape[0], cached_rows(scores)):
        _slope(scores[rows], scored.rows(rows))
    tokens, grads = scored.tokens, scored.grad_log_probs
    for m in range(tokens.shape[1]):  # one column at a time: a token drawn twice in a row is then added in order
        scores.scatter_add_(1, tokens[:, m : m + 1], grads[:, m : m + 1])


def _slope(scores: Tensor, scored: ScoredRows) -> None:
    """The part of the gradient that every column has: all but the tokens' own."""
    log_p = scores.sub_(scored.lse[:, None])
    weight = scored.grad_log_probs.sum(1, keepdim=True).neg_()
    if scored.grad_entropy is None:
        log_p.exp_().mul_(weight)
    else:
        p = log_p.clamp_(min=_LOG_ZERO).exp()
        weight.sub_((scored.grad_entropy * scored.entropy)[:, None])
        log_p.mul_(-scored.grad_entropy[:, None]).add_(weight).mul_(p)
