"""Log-probs of chosen tokens under a projection of hidden states, without the logits in memory."""

import torch
from torch import Tensor

from grpo.kernels.dispatch import use_triton
from grpo.kernels.projection import LogitChunks
from grpo.kernels.row_math import ScoredRows, check_arguments, check_tokens, new_outputs


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at `tokens` [N, M] int64: log-probs [N, M] fp32.

    `hidden` [N, D] and `weight` [V, D] of one or two float types (taken to the wider one). With `return_entropy` also
    the entropy [N] fp32 of each row, in nats. Both have gradients with respect to `hidden` and `weight`; that of an
    input that needs none is not computed. Logits exist in chunks of rows, in fp32, and are computed again in the
    backward pass; every sum is accumulated in fp32 in a fixed order, the weight gradient included. Tokens must lie in
    0 .. V-1; see `token_log_probs`. Raises ValueError for shapes or values out of range.
    """
    check_arguments(hidden, tokens, temperature)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}], not {list(weight.shape)}")
    log_probs, _, entropy = torch.ops.grpo.linear_token_log_probs(
        hidden, weight, tokens, temperature, return_entropy, impl
    )
    return (log_probs, entropy) if return_entropy else log_probs


@torch.library.custom_op("grpo::linear_token_log_probs", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_tokens(tokens, weight.shape[0])
    kind = LogitChunks
    if use_triton(impl, op="linear_token_log_probs", device=hidden.device, obstacle=_obstacle(hidden, weight)):
        from grpo.kernels.triton_linear_log_probs import TritonLogitChunks as kind
        from grpo.kernels.triton_linear_log_probs import launch_forward

        if hidden.dtype != torch.float32:  # tiles of logits that never leave the registers
            with torch.cuda.device_of(hidden):
                return launch_forward(hidden, weight, tokens, temperature, with_entropy)
    outputs = new_outputs(tokens, with_entropy, hidden, weight)
    with torch.cuda.device_of(hidden):
        chunks = kind(hidden, weight, temperature)
        for rows, scores in chunks:
            chunks.score(scores, tokens[rows], *(output[rows] for output in outputs))
    return outputs


@_forward.register_fake
def _(hidden, weight, tokens, temperature, with_entropy, impl):
    return new_outputs(tokens, with_entropy, hidden, weight)


@torch.library.custom_op("grpo::linear_token_log_probs_backward", mutates_args=())
def _backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; an empty tensor for what is not needed."""
    kind = LogitChunks
    if use_triton(impl, op="linear_token_log_probs", device=hidden.device, obstacle=_obstacle(hidden, weight)):
        from grpo.kernels.triton_linear_log_probs import TritonLogitChunks as kind
    scored = ScoredRows(tokens, lse, entropy, grad_log_probs, grad_entropy)
    with torch.cuda.device_of(hidden):
        chunks = kind(hidden, weight, temperature, needs=(needs_hidden, needs_weight))
        for rows, scores in chunks:
            chunks.backward(rows, scores, scored)
        gradients = zip((hidden, weight), chunks.gradients(), strict=True)
    return tuple(x.new_empty(0) if gradient is None else gradient for x, gradient in gradients)


@_backward.register_fake
def _(grad_log_probs, grad_entropy, hidden, weight, tokens, lse, entropy, temperature, *rest):
    needs_hidden, needs_weight, _ = rest
    return hidden.new_empty(hidden.shape if needs_hidden else 0), weight.new_empty(weight.shape if needs_weight else 0)


def linear_gradients(
    hidden: Tensor, weight: Tensor, scored: ScoredRows, needs: tuple[bool, bool], temperature: float, impl: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight with the logits computed again; None for what is not needed."""
    gradients = torch.ops.grpo.linear_token_log_probs_backward(
        scored.grad_log_probs, scored.grad_entropy, hidden, weight, *scored[:3], temperature, *needs, impl
    )
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def _setup_context(ctx, inputs, output):
    hidden, weight, tokens, ctx.temperature, _, ctx.impl = inputs
    ctx.save_for_backward(hidden, weight, tokens, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_log_probs, grad_lse, grad_entropy):
    hidden, weight, *saved = ctx.saved_tensors
    scored = ScoredRows.of(saved, grad_log_probs, grad_entropy)
    gradients = linear_gradients(hidden, weight, scored, ctx.needs_input_grad[:2], ctx.temperature, ctx.impl)
    return *gradients, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _obstacle(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.dtype != weight.dtype:
        return f"hidden is {hidden.dtype} and weight {weight.dtype}"
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"hidden is {hidden.dtype}"
    if hidden.stride(1) != 1 or weight.stride(1) != 1:
        return "the features of a row are not adjacent"
    return None
