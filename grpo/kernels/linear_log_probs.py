"""Log-probs of chosen tokens under a projection of hidden states, without the logits in memory."""

import torch
from torch import Tensor

from grpo.kernels.dispatch import use_triton
from grpo.kernels.linear_chunks import LogitChunks
from grpo.kernels.row_math import check_arguments, check_tokens, new_outputs, score_rows


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
    backward pass (`fused_linear_loss` avoids that); every sum is accumulated in fp32 in a fixed order, the weight
    gradient included. Tokens must lie in 0 .. V-1; see `token_log_probs`. Raises ValueError for shapes or values out of
    range.
    """
    check_projection(hidden, weight, tokens, temperature)
    log_probs, _, entropy = torch.ops.grpo.linear_token_log_probs(
        hidden, weight, tokens, temperature, return_entropy, impl
    )
    return (log_probs, entropy) if return_entropy else log_probs


def check_projection(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> None:
    """Refuses shapes that do not fit together, and a temperature out of range."""
    check_arguments(hidden, tokens, temperature)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}], not {list(weight.shape)}")


@torch.library.custom_op("grpo::linear_token_log_probs", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_tokens(tokens, weight.shape[0])
    if use_triton(impl, op="linear_token_log_probs", device=hidden.device, obstacle=kernel_obstacle(hidden, weight)):
        from grpo.kernels.triton_linear_log_probs import launch_forward

        with torch.cuda.device_of(hidden):
            return launch_forward(hidden, weight, tokens, temperature, with_entropy)
    log_probs, lse, entropy = new_outputs(tokens, with_entropy, hidden, weight)
    for rows, scores in LogitChunks(hidden, weight, temperature=temperature, needs_hidden=False, needs_weight=False):
        score_rows(scores, tokens[rows], log_probs[rows], lse[rows], entropy[rows])
    return log_probs, lse, entropy


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
    kind = LogitChunks
    if use_triton(impl, op="linear_token_log_probs", device=hidden.device, obstacle=kernel_obstacle(hidden, weight)):
        from grpo.kernels.triton_linear_log_probs import TritonLogitChunks as kind
    with torch.cuda.device_of(hidden):
        chunks = kind(hidden, weight, temperature=temperature, needs_hidden=needs_hidden, needs_weight=needs_weight)
        for rows, scores in chunks:
            grad_h = None if grad_entropy is None else grad_entropy[rows]
            part = entropy if grad_h is None else entropy[rows]
            chunks.backward(rows, scores, tokens[rows], lse[rows], part, grad_log_probs[rows], grad_h)
    gradients = (chunks.grad_hidden, hidden), (chunks.grad_weight, weight)
    return tuple(x.new_empty(0) if gradient is None else gradient.to(x.dtype) for gradient, x in gradients)


@_backward.register_fake
def _(
    grad_log_probs,
    grad_entropy,
    hidden,
    weight,
    tokens,
    lse,
    entropy,
    temperature,
    needs_hidden,
    needs_weight,
    impl,
):
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
    return grad_hidden, weight.new_empty(weight.shape if needs_weight else 0)


def _setup_context(ctx, inputs, output):
    hidden, weight, tokens, ctx.temperature, _, ctx.impl = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, tokens, lse, entropy)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_log_probs, grad_lse, grad_entropy):
    hidden, weight, tokens, lse, entropy = ctx.saved_tensors
    if grad_log_probs is None:
        grad_log_probs = torch.zeros(tokens.shape, dtype=lse.dtype, device=lse.device)
    grad_entropy = grad_entropy if entropy.numel() else None
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = torch.ops.grpo.linear_token_log_probs_backward(
        grad_log_probs,
        grad_entropy,
        hidden,
        weight,
        tokens,
        lse,
        entropy,
        ctx.temperature,
        needs_hidden,
        needs_weight,
        ctx.impl,
    )
    return grad_hidden if needs_hidden else None, grad_weight if needs_weight else None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def kernel_obstacle(hidden: Tensor, weight: Tensor) -> str | None:
    """Why the kernels cannot take a projection, or None."""
    if hidden.dtype != weight.dtype:
        return f"hidden is {hidden.dtype} and weight {weight.dtype}"
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"hidden is {hidden.dtype}"
    if hidden.stride(1) != 1 or weight.stride(1) != 1:
        return "the features of a row are not adjacent"
    return None
