"""Log-probs of chosen tokens and the entropy of their rows, under rows of logits or a projection of hidden states."""

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor

from grpo.kernels.block_sizes import block_sizes
from grpo.kernels.dispatch import accumulation_dtype, row_obstacle, use_triton
from grpo.kernels.projection import LogitChunks, keeps_logits
from grpo.kernels.row_math import (
    ScoredRows,
    cached_rows,
    check_arguments,
    check_tokens,
    new_outputs,
    row_chunks,
    score_rows,
    score_rows_backward,
)


@overload
def token_log_probs(
    logits: Tensor, tokens: Tensor, *, temperature: float = ..., return_entropy: Literal[True], impl: str = ...
) -> tuple[Tensor, Tensor]: ...
@overload
def token_log_probs(
    logits: Tensor, tokens: Tensor, *, temperature: float = ..., return_entropy: Literal[False] = ..., impl: str = ...
) -> Tensor: ...
def token_log_probs(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, return_entropy: bool = False, impl: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) of `logits` [N, V] at `tokens` [N, M] int64: log-probs [N, M] fp32.

    With `return_entropy` also the entropy [N] fp32 of each row, in nats. Both have gradients. Only the log-sum-exp of a
    row (and its entropy) is kept for the backward pass, which reads and writes each row once. Rows may be strided.
    Tokens must lie in 0 .. V-1: others raise ValueError on a CPU; on a GPU, where nobody waits for the answer, the
    kernels give them a log-prob of NaN, and their row a gradient of NaN. Raises ValueError for shapes or values out of
    range.
    """
    check_arguments(logits, tokens, temperature)
    if not logits.shape[1]:
        raise ValueError(f"logits must be [N, V] with V > 0, not {list(logits.shape)}")
    log_probs, _, entropy = torch.ops.grpo.token_log_probs(logits, tokens, temperature, return_entropy, impl)
    return (log_probs, entropy) if return_entropy else log_probs


@overload
def linear_token_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *,
    temperature: float = ..., return_entropy: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_token_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *,
    temperature: float = ..., return_entropy: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
def linear_token_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *,
    temperature: float = 1.0, return_entropy: bool = False, impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """log softmax(hidden @ weight.T / temperature) at `tokens` [N, M] int64: log-probs [N, M] fp32.

    `hidden` [N, D] and `weight` [V, D] of one or two float types (taken to the wider one). With `return_entropy` also
    the entropy [N] fp32 of each row, in nats. Both have gradients with respect to `hidden` and `weight`; that of an
    input that needs none is not computed. Logits exist in chunks of rows, in fp32, and are computed again in the
    backward pass; on a GPU up to `KEPT_ELEMENTS` are kept until then. Every sum is
    accumulated in fp32 in a fixed order, the weight gradient included. Tokens must lie in 0 .. V-1; see
    `token_log_probs`. Raises ValueError for shapes or values out of range.
    """
    check_arguments(hidden, tokens, temperature)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}], not {list(weight.shape)}")
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    settings = (temperature, return_entropy, needed and keeps_logits(hidden, weight), impl)
    log_probs, _, entropy, _ = torch.ops.grpo.linear_token_log_probs(hidden, weight, tokens, *settings)
    return (log_probs, entropy) if return_entropy else log_probs


@torch.library.custom_op("grpo::token_log_probs", mutates_args=())
def _forward(
    logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_tokens(tokens, logits.shape[1])
    outputs = new_outputs(tokens, with_entropy, logits)
    if use_triton(impl, op="token_log_probs", device=logits.device, obstacle=row_obstacle(logits=logits)):
        from grpo.kernels.triton_log_probs import launch_forward

        with torch.cuda.device_of(logits):
            launch_forward(logits, tokens, temperature, *outputs)
        return outputs
    for rows, scores in _tempered_chunks(logits, temperature, outputs[0].dtype):
        score_rows(scores, tokens[rows], *(output[rows] for output in outputs))
    return outputs


@torch.library.custom_op("grpo::token_log_probs_backward", mutates_args=())
def _backward(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, logits: Tensor, tokens: Tensor, lse: Tensor, entropy: Tensor,
    temperature: float, impl: str,
) -> Tensor:  # fmt: skip
    scored = ScoredRows(tokens, lse, entropy, grad_log_probs, grad_entropy)
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if use_triton(impl, op="token_log_probs", device=logits.device, obstacle=row_obstacle(logits=logits)):
        from grpo.kernels.triton_log_probs import launch_backward

        with torch.cuda.device_of(logits):
            launch_backward(logits, scored, temperature, grad_logits)
        return grad_logits
    for rows, scores in _tempered_chunks(logits, temperature, lse.dtype):
        score_rows_backward(scores, scored.rows(rows), temperature)
        grad_logits[rows] = scores
    return grad_logits


@_backward.register_fake
def _(grad_log_probs, grad_entropy, logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _tempered_chunks(logits: Tensor, temperature: float, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows and logits / temperature in `dtype`, in one buffer that every chunk overwrites."""
    size = min(max(1, logits.shape[0]), cached_rows(logits))
    buffer = logits.new_empty(size, logits.shape[1], dtype=dtype)
    for rows in row_chunks(logits.shape[0], size):
        scores = buffer[: rows.stop - rows.start].copy_(logits[rows])
        yield rows, scores if temperature == 1 else scores.div_(temperature)


@torch.library.custom_op("grpo::linear_token_log_probs", mutates_args=())
def _linear_forward(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, keep: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_probs, lse, entropy or [0], and with `keep` the scores [N, V] of the chunks, or [0, V]."""
    check_tokens(tokens, weight.shape[0])
    chunk_kind = chunk_kind_of(hidden, weight, impl)
    none_kept = hidden.new_empty(0, len(weight), dtype=accumulation_dtype(hidden, weight))
    with torch.cuda.device_of(hidden):
        library = hidden.dtype == torch.float32 or block_sizes("linear_split", hidden.shape[1])["library"]
        if chunk_kind is not LogitChunks and not library and not keep:
            from grpo.kernels.triton_linear_log_probs import launch_forward

            logits_in_registers = launch_forward(hidden, weight, tokens, temperature, with_entropy)
            return *logits_in_registers, none_kept
        outputs = new_outputs(tokens, with_entropy, hidden, weight)
        chunks = chunk_kind(hidden, weight, temperature)
        if keep:
            return *outputs, chunks.score_kept(outputs, tokens)
        for rows, scores in chunks:
            chunks.score(scores, tokens[rows], *(output[rows] for output in outputs))
    return *outputs, none_kept


@torch.library.custom_op("grpo::linear_token_log_probs_backward", mutates_args=())
def _linear_backward(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, tokens: Tensor, lse: Tensor,
    entropy: Tensor, kept: Tensor | None, temperature: float, needs_hidden: bool, needs_weight: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight as they are needed, an empty tensor for what is not.

    `kept` are the scores [N, V] of the forward pass; where there are none they are computed again.
    """
    scored = ScoredRows(tokens, lse, entropy, grad_log_probs, grad_entropy)
    with torch.cuda.device_of(hidden):
        chunks = chunk_kind_of(hidden, weight, impl)(hidden, weight, temperature, (needs_hidden, needs_weight))
        if kept is not None and len(kept):
            chunks.backward_kept(kept, scored)
        else:
            for rows, scores in chunks:
                chunks.backward(rows, scores, scored)
        return chunks.gradients()


@_linear_backward.register_fake
def _(grad_log_probs, grad_entropy, hidden, weight, tokens, lse, entropy, kept, temperature, *rest):
    needs_hidden, needs_weight, _ = rest
    return hidden.new_empty(hidden.shape if needs_hidden else 0), weight.new_empty(weight.shape if needs_weight else 0)


def chunk_kind_of(hidden: Tensor, weight: Tensor, impl: str) -> type[LogitChunks]:
    """What makes and uses the chunks of logits of such operands."""
    obstacle = row_obstacle(hidden=hidden, weight=weight)
    if hidden.dtype != weight.dtype:
        obstacle = f"hidden is {hidden.dtype} and weight {weight.dtype}"
    if use_triton(impl, op="linear_token_log_probs", device=hidden.device, obstacle=obstacle):
        from grpo.kernels.triton_linear_log_probs import TritonLogitChunks

        return TritonLogitChunks
    return LogitChunks


def _setup_context(ctx, inputs, output):
    logits, tokens, ctx.temperature, _, ctx.impl = inputs
    ctx.save_for_backward(logits, tokens, *output[1:])
    ctx.set_materialize_grads(False)


def _setup_linear_context(ctx, inputs, output):
    *tensors, ctx.temperature, _, _, ctx.impl = inputs  # tensors: hidden, weight, tokens
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_log_probs, _, grad_entropy):
    logits, *saved = ctx.saved_tensors
    scored = ScoredRows.of(saved, grad_log_probs, grad_entropy)
    gradient = torch.ops.grpo.token_log_probs_backward(*scored[3:], logits, *scored[:3], ctx.temperature, ctx.impl)
    return gradient, None, None, None, None


def _linear_autograd(ctx, grad_log_probs, _, grad_entropy, __):
    hidden, weight, *saved, kept = ctx.saved_tensors
    scored = ScoredRows.of(saved, grad_log_probs, grad_entropy)
    gradients = torch.ops.grpo.linear_token_log_probs_backward(
        *scored[3:], hidden, weight, *scored[:3], kept, ctx.temperature, *ctx.needs_input_grad[:2], ctx.impl
    )
    return *gradients, None, None, None, None, None


_forward.register_fake(lambda logits, tokens, _, with_entropy, __: new_outputs(tokens, with_entropy, logits))
_forward.register_autograd(_autograd, setup_context=_setup_context)


@_linear_forward.register_fake
def _(hidden, weight, tokens, temperature, with_entropy, keep, impl):
    kept = (len(hidden) if keep else 0, len(weight))
    outputs = new_outputs(tokens, with_entropy, hidden, weight)
    return *outputs, hidden.new_empty(kept, dtype=accumulation_dtype(hidden, weight))


_linear_forward.register_autograd(_linear_autograd, setup_context=_setup_linear_context)
