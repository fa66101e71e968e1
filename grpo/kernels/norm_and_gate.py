"""What stands between the matrix products of a transformer block, for sampling: residual, RMS norm, gate of SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype, row_obstacle, use_triton

MAX_WIDTH = 16384


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s) * weight, s) of s = residual + x, all [N, D]; without a residual s is x. No gradient flows through.

    The mean square is fp32 (Zhang & Sennrich, arXiv 1910.07467); s and the normalised rows are rounded to x's dtype
    before they are used, as modules of their own round them. `weight` is [D]. Raises ValueError for wrong shapes.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or (residual is not None and residual.shape != x.shape):
        found = None if residual is None else [*residual.shape]
        raise ValueError(f"x {[*x.shape]}, residual {found} and weight {[*weight.shape]} must be [N, D], [N, D], [D]")
    normed, total = torch.ops.grpo.add_rms_norm(x.detach(), residual, weight.detach(), eps, impl)
    return normed, x if residual is None else total


@torch.library.custom_op("grpo::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    others = {"weight": weight[None]} if residual is None else {"weight": weight[None], "residual": residual}
    obstacle = row_obstacle(x=x, **others)
    if len({x.dtype, *(other.dtype for other in others.values())}) > 1:
        obstacle = "x, residual and weight have several dtypes"
    elif x.shape[1] > MAX_WIDTH:
        obstacle = f"a row of {x.shape[1]} columns does not fit in registers"
    if use_triton(impl, op="add_rms_norm", device=x.device, obstacle=obstacle):
        from grpo.kernels.triton_norm_and_gate import launch_norm

        with torch.cuda.device_of(x):
            return launch_norm(x, residual, weight, eps)
    total = x if residual is None else residual + x
    normed = F.rms_norm(total.to(accumulation_dtype(x)), x.shape[1:], eps=eps).type_as(x) * weight
    return normed, x.new_empty(0) if residual is None else total


@_add_rms_norm.register_fake
def _(x, residual, *_):
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)


def silu_mul(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up, all [N, F], the gate of SwiGLU (Shazeer, arXiv 2002.05202). No gradient flows through.

    silu is fp32 and rounded to the dtype before the product. Rows may be strided: halves of one product [N, 2F] are
    read as they are. Raises ValueError for wrong shapes.
    """
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {[*gate.shape]} {gate.dtype} and up {[*up.shape]} {up.dtype} must be [N, F] of one dtype"
        )
    return torch.ops.grpo.silu_mul(gate.detach(), up.detach(), impl)


@torch.library.custom_op("grpo::silu_mul", mutates_args=())
def _silu_mul(gate: Tensor, up: Tensor, impl: str) -> Tensor:
    if use_triton(impl, op="silu_mul", device=gate.device, obstacle=row_obstacle(gate=gate, up=up)):
        from grpo.kernels.triton_norm_and_gate import launch_gate

        with torch.cuda.device_of(gate):
            return launch_gate(gate, up)
    return F.silu(gate) * up


@_silu_mul.register_fake
def _(gate, *_):
    return gate.new_empty(gate.shape)
