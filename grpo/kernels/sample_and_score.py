"""Draws from a projection of hidden states and their differentiable log-probs, from one product per chunk of rows."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.kernels.projection import project_logits
from grpo.kernels.row_math import row_chunks, score_rows_backward
from grpo.kernels.sampling import sample_tokens

# Logits worked on at once, by device type.
_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}

_KEPT_ELEMENTS = {"cpu": 1 << 24}  # see `_keeps_logits`


class ScoredSample(NamedTuple):
    """Result of `sample_and_score`; log-probs and entropy have gradients."""

    tokens: Tensor
    """[N, num_samples] int64."""
    log_probs: Tensor
    """[N, num_samples] fp32, of the full tempered distribution."""
    kept_mass: Tensor
    """[N] fp32, probability of the set that top-k and top-p left to draw from."""
    entropy: Tensor
    """[N] fp32 of the full tempered distribution, nats."""
    target_log_probs: Tensor | None
    """[N] fp32 of the targets under that distribution, None without targets."""


def sample_and_score(
    hidden: Tensor,
    weight: Tensor,
    *,
    num_samples: int,
    seed: int,
    row_ids: Tensor,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    impl: str = "auto",
) -> ScoredSample:
    """`sample_tokens` of softmax(hidden @ weight.T / temperature) and `linear_token_log_probs` of what it draws.

    The logits of a chunk are computed once for both. The backward pass is that of `linear_token_log_probs`: it computes
    them again, or, on a CPU and while all of them fit into 64 MB, takes those of the forward pass, which it uses up.

    Args:
        hidden: [N, D].
        weight: [V, D].
        row_ids: [N] int64, see `sample_tokens` for these and for `temperature`, `top_k`, `top_p`, `seed`.
        targets: [N] int64, given tokens to be scored as well.
        impl: backend of the operations.
    """
    draw = {"num_samples": num_samples, "seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, log_probs, kept_mass, entropy = _SampleAndScore.apply(hidden, weight, targets, row_ids, draw, impl)
    target_log_probs = None if targets is None else log_probs[:, num_samples]
    return ScoredSample(tokens, log_probs[:, :num_samples], kept_mass, entropy, target_log_probs)


def sample_projection(
    hidden: Tensor, weight: Tensor, *, row_ids: Tensor, **settings: int | float | str
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, log_probs [N, num_samples] and kept_mass [N] of `sample_tokens` for a projection, without gradients.

    Args:
        hidden, weight, row_ids: as in `sample_and_score`.
        settings: the other arguments of `sample_tokens`.
    """
    parts = []
    for rows in _chunks(hidden, weight):
        logits = project_logits(hidden[rows], weight)
        sample = sample_tokens(logits, row_ids=row_ids[rows], **settings)
        parts.append((sample.tokens, sample.log_probs, sample.kept_mass))
    tokens, log_probs, kept_mass = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, log_probs, kept_mass


def _keeps_logits(hidden: Tensor, weight: Tensor, impl: str) -> bool:
    """The one place that decides whether logits outlive the forward pass.

    A CPU keeps those of a few chunks for the backward pass, 64 MB at most, since another product costs it more than
    reading them. A GPU never does: [N, V] is what it has no memory for, and at a vocabulary of 16384 its product is
    about as cheap as the traffic. Neither do the Triton kernels where they are interpreted: they stand for a GPU.
    """
    return impl != "triton" and len(hidden) * len(weight) <= _KEPT_ELEMENTS.get(hidden.device.type, 0)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """The rows of each chunk of logits."""
    return row_chunks(len(hidden), max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 1 << 22) // len(weight)))


class _SampleAndScore(torch.autograd.Function):
    """Log-probs come with those of the targets as a last column."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, row_ids, draw, impl):
        ctx.temperature, ctx.impl = draw["temperature"], impl
        keep = _keeps_logits(hidden, weight, impl)
        ctx.kept = [] if keep else None
        parts = []
        for rows in _chunks(hidden, weight):
            logits = project_logits(hidden[rows], weight)
            sample = sample_tokens(logits, row_ids=row_ids[rows], impl=impl, **draw)
            scored = sample.tokens if targets is None else torch.cat([sample.tokens, targets[rows, None]], dim=1)
            scores = torch.ops.grpo.token_log_probs(logits, scored, ctx.temperature, True, impl)
            parts.append((sample.tokens, sample.kept_mass, scored, *scores))
            if keep:
                ctx.kept.append(logits)
            del logits  # before the next chunk is computed, or there would be two
        tokens, kept_mass, scored, log_probs, lse, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, scored, lse, entropy)
        ctx.mark_non_differentiable(tokens, kept_mass)
        ctx.set_materialize_grads(False)
        return tokens, log_probs, kept_mass, entropy

    @staticmethod
    def backward(ctx, _, grad_log_probs, __, grad_entropy):
        hidden, weight, tokens, lse, entropy = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros(tokens.shape, dtype=lse.dtype, device=lse.device)
        grad_log_probs = grad_log_probs.contiguous()  # that of a sum is one number, expanded
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            gradients = torch.ops.grpo.linear_token_log_probs_backward(
                grad_log_probs, grad_entropy, hidden, weight, tokens, lse, entropy,
                ctx.temperature, needs_hidden, needs_weight, ctx.impl,
            )  # fmt: skip
            grad_hidden, grad_weight = (
                value if needed else None for value, needed in zip(gradients, (needs_hidden, needs_weight), strict=True)
            )
        else:
            for rows, logits in zip(_chunks(hidden, weight), kept, strict=True):
                if ctx.temperature != 1:
                    logits.div_(ctx.temperature)
                grad_h = None if grad_entropy is None else grad_entropy[rows] / ctx.temperature
                grad_chunk = grad_log_probs[rows] / ctx.temperature
                score_rows_backward(logits, tokens[rows], lse[rows], entropy[rows], grad_chunk, grad_h)
            grad_hidden, grad_weight = _products(kept, hidden, weight, needs_hidden, needs_weight)
        return grad_hidden, grad_weight, None, None, None, None


def _products(
    grad_logits: list[Tensor], hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `hidden` and `weight` from those of the logits, chunk by chunk, summed in fp32."""
    wide_hidden, wide_weight = hidden.to(grad_logits[0].dtype), weight.to(grad_logits[0].dtype)
    grad_hidden = wide_hidden.new_empty(hidden.shape) if needs_hidden else None
    grad_weight = None
    for rows, chunk in zip(_chunks(hidden, weight), grad_logits, strict=True):
        if needs_hidden:
            torch.mm(chunk, wide_weight, out=grad_hidden[rows])
        if needs_weight and grad_weight is None:
            grad_weight = chunk.t() @ wide_hidden[rows]
        elif needs_weight:
            grad_weight.addmm_(chunk.t(), wide_hidden[rows])
    return (
        None if grad_hidden is None else grad_hidden.to(hidden.dtype),
        None if grad_weight is None else grad_weight.to(weight.dtype),
    )
