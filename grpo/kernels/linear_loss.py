"""A loss of log-probs under a projection, its gradients taken chunk by chunk while the logits are there."""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.kernels.dispatch import use_triton
from grpo.kernels.linear_chunks import LogitChunks
from grpo.kernels.linear_log_probs import check_projection, kernel_obstacle
from grpo.kernels.row_math import check_tokens

ChunkLoss = Callable[[slice, Tensor, Tensor | None], Tensor]


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    loss: ChunkLoss,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    group: int = 1,
    impl: str = "auto",
) -> Tensor:
    """The sum over chunks of rows of `loss`, a function of their log-probs under a projection: 0-dim, differentiable.

    `loss(rows, log_probs, entropy)` is called for one slice of 0 .. N-1 after the other, with what
    `linear_token_log_probs` gives for those rows: log-probs [n, M], and the entropy [n] or None. It returns a 0-dim
    tensor that depends on these rows alone. `group` neighbouring rows are never cut apart, for losses over sequences.

    The backward pass of `linear_token_log_probs` does not know the gradients of its outputs before it runs, and
    computes the logits again: four matrix products in all. Here each chunk's loss is differentiated while its logits
    are there, which makes three, and the forward pass leaves nothing but the gradients of `hidden` and `weight`.
    The backward pass gives these away and runs once. In fp16 multiply the loss scale inside `loss`: it is too late
    outside. Runs eagerly, also inside `torch.compile`. Raises ValueError for shapes or values out of range.
    """
    check_projection(hidden, weight, tokens, temperature)
    if group < 1 or hidden.shape[0] % group:
        raise ValueError(f"group is {group}; it must divide the number of rows, {hidden.shape[0]}")
    check_tokens(tokens, weight.shape[0])
    return _chunked_loss(hidden, weight, tokens, loss, temperature, with_entropy, group, impl)


@torch.compiler.disable
def _chunked_loss(hidden, weight, tokens, loss, temperature, with_entropy, group, impl) -> Tensor:
    needs = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _FusedLinearLoss.apply(hidden, weight, tokens, loss, temperature, with_entropy, group, impl, tuple(needs))


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, loss, temperature, with_entropy, group, impl, needs):
        kind = LogitChunks
        if use_triton(impl, op="fused_linear_loss", device=hidden.device, obstacle=kernel_obstacle(hidden, weight)):
            from grpo.kernels.triton_linear_log_probs import TritonLogitChunks as kind
        needs_hidden, needs_weight = needs
        with torch.cuda.device_of(hidden):
            chunks = kind(hidden, weight, temperature=temperature, needs_hidden=needs_hidden, needs_weight=needs_weight)
            total = None
            for rows, logits in chunks.of_groups(group):
                value = _chunk_loss(chunks, rows, logits, tokens[rows], loss, with_entropy, any(needs))
                total = value if total is None else total + value
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.gradients = chunks.grad_hidden, chunks.grad_weight
        return hidden.new_zeros((), dtype=torch.float32) if total is None else total

    @staticmethod
    def backward(ctx, grad_loss):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("fused_linear_loss: backward has run already and used the gradients up")
        # In place: they are as large as what they are returned as, and are not needed again.
        scaled = (
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, *[None] * 7


def _chunk_loss(
    chunks: LogitChunks,
    rows: slice,
    logits: Tensor,
    tokens: Tensor,
    loss: ChunkLoss,
    with_entropy: bool,
    with_gradient: bool,
) -> Tensor:
    """The loss of one chunk, whose gradients are added where they are wanted."""
    log_probs, lse, entropy = chunks.score(logits, tokens, with_entropy)
    inputs = [log_probs, entropy] if with_entropy else [log_probs]
    with torch.set_grad_enabled(with_gradient):
        leaves = [tensor.detach().requires_grad_(with_gradient) for tensor in inputs]
        value = loss(rows, leaves[0], leaves[1] if with_entropy else None)
    if with_gradient and value.requires_grad:
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        grad_log_probs = torch.zeros_like(log_probs) if gradients[0] is None else gradients[0]
        grad_entropy = gradients[1] if with_entropy else None
        chunks.backward(rows, logits, tokens, lse, entropy, grad_log_probs, grad_entropy)
    elif chunks.grad_hidden is not None:
        chunks.grad_hidden[rows] = 0
    return value.detach()
