"""Log-probs of chosen tokens under rows of logits, and the entropy of the rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.kernels.dispatch import use_triton
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


@torch.library.custom_op("grpo::token_log_probs", mutates_args=())
def _forward(
    logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_tokens(tokens, logits.shape[1])
    outputs = new_outputs(tokens, with_entropy, logits)
    if use_triton(impl, op="token_log_probs", device=logits.device, obstacle=_obstacle(logits)):
        from grpo.kernels.triton_log_probs import launch_forward

        with torch.cuda.device_of(logits):
            launch_forward(logits, tokens, temperature, *outputs)
        return outputs
    for rows, scores in _tempered_chunks(logits, temperature, outputs[0].dtype):
        score_rows(scores, tokens[rows], *(output[rows] for output in outputs))
    return outputs


@_forward.register_fake
def _(logits, tokens, temperature, with_entropy, impl):
    return new_outputs(tokens, with_entropy, logits)


@torch.library.custom_op("grpo::token_log_probs_backward", mutates_args=())
def _backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    impl: str,
) -> Tensor:
    scored = ScoredRows(tokens, lse, entropy, grad_log_probs, grad_entropy)
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if use_triton(impl, op="token_log_probs", device=logits.device, obstacle=_obstacle(logits)):
        from grpo.kernels.triton_log_probs import launch_backward

        with torch.cuda.device_of(logits):
            launch_backward(logits, scored, temperature, grad_logits)
        return grad_logits
    for rows, scores in _tempered_chunks(logits, temperature, lse.dtype):
        score_rows_backward(scores, scored.rows(rows), temperature)
        grad_logits[rows] = scores
    return grad_logits


@_backward.register_fake
def _(grad_log_probs, grad_entropy, logits, tokens, lse, entropy, temperature, impl):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, tokens, ctx.temperature, _, ctx.impl = inputs
    ctx.save_for_backward(logits, tokens, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_log_probs, grad_lse, grad_entropy):
    logits, *saved = ctx.saved_tensors
    scored = ScoredRows.of(saved, grad_log_probs, grad_entropy)
    gradient = torch.ops.grpo.token_log_probs_backward(
        scored.grad_log_probs, scored.grad_entropy, logits, *scored[:3], ctx.temperature, ctx.impl
    )
    return gradient, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _tempered_chunks(logits: Tensor, temperature: float, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows and logits / temperature in `dtype`, in one buffer that every chunk overwrites."""
    size = min(max(1, logits.shape[0]), cached_rows(logits))
    buffer = logits.new_empty(size, logits.shape[1], dtype=dtype)
    for rows in row_chunks(logits.shape[0], size):
        scores = buffer[: rows.stop - rows.start].copy_(logits[rows])
        yield rows, scores if temperature == 1 else scores.div_(temperature)


def _obstacle(logits: Tensor) -> str | None:
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"logits are {logits.dtype}"
    if logits.stride(1) != 1:
        return "the columns of a row are not adjacent"
    return None
