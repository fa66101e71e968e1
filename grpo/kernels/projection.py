"""Logits of a projection hidden [N, D] @ weight.T [D, V], whole for a few rows or in chunks of rows with gradients."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype
from grpo.kernels.row_math import ScoredRows, row_chunks, score_rows, score_rows_backward

# Logits held at once, by device type. On a CPU a larger chunk leaves the cache. On a GPU each chunk reads and writes
# the fp32 weight gradient once more, and products need whole waves of tiles: for the gradient of 5632 rows of D = 1536
# they are two, of tiles of 128 x 256 on 132 processors. With V = 16384 that is 369 MB.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 5632 << 14}
# Logits that `linear_token_log_probs` keeps for its backward pass, by device type, to save one product of four: on a
# GPU 2.1 GB, those of 56 contexts of 576 codes at V = 16384, whose blocks keep many times as much.
KEPT_ELEMENTS = {"cuda": 1 << 29}


@torch.no_grad()
def project_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, D] @ weight.T [D, V] -> logits [N, V] fp32, without gradient.

    Use it for the rows that are sampled now, in chunks; log-probs under a gradient come from `linear_token_log_probs`.
    """
    return wide_product(hidden, weight.t())


def wide_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right in fp32, in fp64 where an input is. Half-precision operands keep the fp32 of the accumulator.

    bf16 logits of size 8 to 16 are off by up to 0.03, which would go straight into log-probs.
    """
    if left.dtype == right.dtype and mixed_products(left):
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    dtype = accumulation_dtype(left, right)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def mixed_products(operand: Tensor) -> bool:
    """Whether the library multiplies these half-precision operands into an fp32 result; cuBLAS does."""
    return operand.dtype.itemsize == 2 and operand.is_cuda and torch.version.hip is None


def keeps_logits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the logits of these rows are kept between the passes of `linear_token_log_probs`."""
    return 0 < len(hidden) * len(weight) <= KEPT_ELEMENTS.get(hidden.device.type, 0)


def projection_chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """The rows of each chunk of logits."""
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"])
    return row_chunks(len(hidden), max(1, elements // len(weight)))


class LogitChunks:
    """The scores (logits / temperature) of a projection in chunks, in fp32 (fp64 where an input is), and its gradients.

    A product of bf16 or fp16 numbers is exact in fp32. A chunk lies in a buffer that the next one overwrites. The
    gradients that are needed, of (`hidden`, `weight`), add up in `backward`.
    """

    widens = True  # takes the operands to the type of the sums
    score = staticmethod(score_rows)
    """Fills log-probs, lse and entropy from scores [n, V], which are used up."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, temperature: float, needs: Sequence[bool] = (False, False)
    ) -> None:
        self.dtypes, self.dtype = (hidden.dtype, weight.dtype), accumulation_dtype(hidden, weight)
        self.hidden, self.weight = (x.to(self.dtype) if self.widens else x for x in (hidden, weight))
        self.temperature, (self.needs_hidden, self.needs_weight) = temperature, needs
        self.grad_hidden = self.hidden.new_empty(hidden.shape if self.needs_hidden else 0)
        self.grad_weight = weight.new_zeros(weight.shape if self.needs_weight else 0, dtype=self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each chunk and their scores [n, V]."""
        chunks = list(projection_chunks(self.hidden, self.weight))
        buffer = self.hidden.new_empty(chunks[0].stop, len(self.weight), dtype=self.dtype)  # no chunk is larger
        for rows in chunks:
            scores = buffer[: rows.stop - rows.start]
            self.product(self.hidden[rows], scores)
            yield rows, scores

    def product(self, hidden: Tensor, scores: Tensor) -> None:
        """Fills scores [n, V]."""
        torch.addmm(scores, hidden, self.weight.t(), beta=0, alpha=1 / self.temperature, out=scores)

    def tempered(self, logits: Tensor) -> Tensor:
        """Scores from logits, which are used up."""
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def backward(self, rows: slice, scores: Tensor, scored: ScoredRows) -> None:
        """Adds these rows' part of the gradients. `scores` [n, V] are used up; `scored` are all N rows."""
        score_rows_backward(scores, scored.rows(rows), self.temperature)
        self.add_gradients(rows, scores)

    def add_gradients(self, rows: slice, grad_logits: Tensor) -> None:
        """Adds these rows' part of the gradients, given that of their logits [n, V]."""
        if self.needs_hidden:
            torch.mm(grad_logits, self.weight, out=self.grad_hidden[rows])
        if self.needs_weight:
            self.grad_weight.addmm_(grad_logits.t(), self.hidden[rows])

    def score_kept(self, outputs: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """The scores [N, V] of all rows in one piece, kept, after `score`."""
        scores = self.hidden.new_empty(len(self.hidden), len(self.weight), dtype=self.dtype)
        self.product(self.hidden, scores)
        self.score(scores.clone(), tokens, *outputs)
        return scores

    def backward_kept(self, scores: Tensor, scored: ScoredRows) -> None:
        """`backward` of all rows, from scores that stay as they are."""
        self.backward(slice(None), scores.clone(), scored)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of hidden and weight, in their types; an empty tensor for what is not needed."""
        return self.grad_hidden.to(self.dtypes[0]), self.grad_weight.to(self.dtypes[1])
