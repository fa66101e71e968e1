"""KL divergences between a projection's distribution and a teacher's, over the whole vocabulary, in chunks of rows.

With q = softmax(s) of the student's scores s = logits / temperature, and p that of the teacher,

    forward  KL(p || q) = sum_j p_j (log p_j - log q_j)        d / d s_j = q_j - p_j
    reverse  KL(q || p) = sum_j q_j (log q_j - log p_j) = R    d / d s_j = q_j (log q_j - log p_j - R)

The gradients are exact, where those of a drawn token's log-ratio are an estimate.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype, check_temperature
from grpo.kernels.projection import LogitChunks


def linear_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    temperature: float = 1.0, teacher_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KL(p || q) and KL(q || p), each [N] in nats, of q = softmax(hidden @ weight.T / temperature) and the teacher's p.

    `hidden` [N, D] and `weight` [V, D] have gradients; `teacher_hidden` [N, D'] and `teacher_weight` [V, D'] have none.
    Logits of both exist in chunks of rows, in fp32 (fp64 where an input is), and are computed again in the backward
    pass: [N, V] is never kept. Raises ValueError for shapes or values out of range.
    """
    check_temperature(temperature)
    check_temperature(teacher_temperature)
    shapes = [list(x.shape) for x in (hidden, weight, teacher_hidden, teacher_weight)]
    if any(len(shape) != 2 for shape in shapes) or (
        shapes[0][1] != shapes[1][1] or shapes[2] != [shapes[0][0], shapes[3][1]] or shapes[3][0] != shapes[1][0]
    ):
        raise ValueError(f"expected [N, D], [V, D], [N, D'] and [V, D'], not {', '.join(map(str, shapes))}")
    teacher = (teacher_hidden.detach(), teacher_weight.detach())
    return torch.ops.grpo.linear_kl(hidden, weight, *teacher, temperature, teacher_temperature)


@torch.library.custom_op("grpo::linear_kl", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    student = LogitChunks(hidden, weight, temperature)
    forward, reverse = _outputs(hidden, weight, teacher_hidden)
    for rows, log_q, log_p in _log_softmaxes(student, LogitChunks(teacher_hidden, teacher_weight, teacher_temperature)):
        gap = log_p - log_q
        forward[rows] = (log_p.exp_() * gap).sum(1)
        reverse[rows] = -(log_q.exp_().mul_(gap)).sum(1)
    return forward, reverse


@torch.library.custom_op("grpo::linear_kl_backward", mutates_args=())
def _backward(
    grad_forward: Tensor, grad_reverse: Tensor, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor,
    teacher_weight: Tensor, reverse: Tensor, temperature: float, teacher_temperature: float, needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight as they are needed, an empty tensor for what is not."""
    student = LogitChunks(hidden, weight, temperature, (needs_hidden, needs_weight))
    teacher = LogitChunks(teacher_hidden, teacher_weight, teacher_temperature)
    for rows, log_q, log_p in _log_softmaxes(student, teacher):
        of_forward, of_reverse = (grad[rows, None] / temperature for grad in (grad_forward, grad_reverse))
        gap = log_q - log_p
        q, p = log_q.exp_(), log_p.exp_()
        slope = gap.sub_(reverse[rows, None]).mul_(of_reverse).add_(of_forward).mul_(q)
        student.add_gradients(rows, slope.sub_(p.mul_(of_forward)))
    return student.gradients()


def _log_softmaxes(student: LogitChunks, teacher: LogitChunks) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The rows of each chunk with log q and log p [n, V], which are the caller's to overwrite."""
    for (rows, own), (_, others) in zip(student, teacher, strict=True):
        yield rows, own.log_softmax(1), others.to(own.dtype).log_softmax(1)


def _outputs(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
    empty = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden, weight))
    return empty, torch.empty_like(empty)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.teacher_temperature = inputs
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, grad_forward, grad_reverse):
    settings = (ctx.temperature, ctx.teacher_temperature, *ctx.needs_input_grad[:2])
    gradients = (grad_forward.contiguous(), grad_reverse.contiguous())  # that of a sum is expanded
    return *torch.ops.grpo.linear_kl_backward(*gradients, *ctx.saved_tensors, *settings), *[None] * 4


@_backward.register_fake
def _(grad_forward, grad_reverse, hidden, weight, *rest):
    needs_hidden, needs_weight = rest[-2:]
    return hidden.new_empty(hidden.shape if needs_hidden else 0), weight.new_empty(weight.shape if needs_weight else 0)


_forward.register_fake(lambda hidden, weight, teacher_hidden, *_: _outputs(hidden, weight, teacher_hidden))
_forward.register_autograd(_autograd, setup_context=_setup_context)
