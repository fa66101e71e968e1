"""Logits of a projection in chunks of rows: the reference of `linear_token_log_probs` and `fused_linear_loss`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype
from grpo.kernels.row_math import cached_rows, new_outputs, row_chunks, score_rows, score_rows_backward

# Logits held at once. A chunk too small re-reads the weight too often, one too large leaves the cache.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}


class LogitChunks:
    """hidden [N, D] @ weight.T [D, V] in chunks of rows, in fp32 (fp64 where an input is), with its gradients.

    A product of bf16 or fp16 numbers is exact in fp32. A chunk lies in a buffer that the next one overwrites.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, *, temperature: float, needs_hidden: bool, needs_weight: bool
    ) -> None:
        self.dtypes = hidden.dtype, weight.dtype
        dtype = accumulation_dtype(hidden, weight)
        self.hidden, self.weight, self.temperature = hidden.to(dtype), weight.to(dtype), temperature
        self.grad_hidden = self.hidden.new_empty(hidden.shape) if needs_hidden else None
        self.grad_weight = self.weight.new_zeros(weight.shape) if needs_weight else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return self.of_groups(1)

    def of_groups(self, group: int) -> Iterator[tuple[slice, Tensor]]:
        """Chunks that do not cut a group of so many neighbouring rows: (rows, their scores [n, V])."""
        N, V = self.hidden.shape[0], self.weight.shape[0]
        wanted = CHUNK_ELEMENTS.get(self.hidden.device.type, CHUNK_ELEMENTS["cpu"]) // V
        size = max(1, min(N, max(1, wanted // group) * group))
        buffer = self.hidden.new_empty(size, V, dtype=accumulation_dtype(self.hidden))
        for rows in row_chunks(N, size):
            scores = buffer[: rows.stop - rows.start]
            self._product(self.hidden[rows], scores)
            yield rows, scores

    def _product(self, hidden: Tensor, scores: Tensor) -> None:
        torch.addmm(scores, hidden, self.weight.t(), beta=0, alpha=1 / self.temperature, out=scores)

    def score(self, scores: Tensor, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """log-probs [n, M], lse [n] and entropy [n] (or [0]) of scores [n, V], which stay as they are."""
        log_probs, lse, entropy = new_outputs(tokens, with_entropy, scores)
        for piece in row_chunks(scores.shape[0], cached_rows(scores)):
            score_rows(scores[piece].clone(), tokens[piece], log_probs[piece], lse[piece], entropy[piece])
        return log_probs, lse, entropy

    def backward(
        self,
        rows: slice,
        scores: Tensor,
        tokens: Tensor,
        lse: Tensor,
        entropy: Tensor,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """Adds these rows' part of the gradients. `scores` are used up; the rest are those of the rows alone."""
        grad_log_probs = grad_log_probs / self.temperature
        grad_entropy = None if grad_entropy is None else grad_entropy / self.temperature
        score_rows_backward(scores, tokens, lse, entropy, grad_log_probs, grad_entropy)
        if self.grad_hidden is not None:
            torch.mm(scores, self.weight, out=self.grad_hidden[rows])
        if self.grad_weight is not None:
            self.grad_weight.addmm_(scores.t(), self.hidden[rows])
