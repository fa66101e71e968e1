"""Matrix products of a few rows with what stands around them in a transformer block, for sampling.

Such a product takes the time in which its weights are read, and a kernel of its own before and after it takes almost as
long. Here a norm is computed by the product that reads it, and a residual is added by the product that makes it:

    y, squares = linear_add(...)      the residual stream, and sums of squares of its rows
    norm_linear(y, squares, ...)      rms_norm(y) * norm_weight, times one matrix, or times two with SwiGLU's gate
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype, row_obstacle, use_triton

MAX_ROWS = 32  # of which the kernels multiply; with more the library's products are better
SQUARES = 16  # columns whose squares are summed together


def norm_linear(
    x: Tensor, squares: Tensor, norm_weight: Tensor, weight: Tensor, up_weight: Tensor | None = None, *,
    eps: float, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """n @ weight.T of n = rms_norm(x) * norm_weight; with `up_weight` silu(n @ weight.T) * (n @ up_weight.T).

    `x` is [N, D], `weight` and `up_weight` [F, D], the result [N, F]; `squares` [N, S] fp32 are sums that add up to
    those of x's rows. The products are rounded to x's dtype before the gate, as modules of their own round them. No
    gradient flows through.
    Raises ValueError for wrong shapes.
    """
    up_shape = weight.shape if up_weight is None else up_weight.shape
    if x.ndim != 2 or weight.ndim != 2 or not x.shape[1:] == weight.shape[1:] == norm_weight.shape:
        found = [*x.shape], [*norm_weight.shape], [*weight.shape]
        raise ValueError(f"x, norm_weight and weight must be [N, D], [D] and [F, D], not {found}")
    if up_shape != weight.shape or squares.ndim != 2 or len(squares) != len(x):
        raise ValueError(f"squares must be [{len(x)}, S] and up_weight {[*weight.shape]}")
    tensors = (x, squares, norm_weight, weight, up_weight)
    return torch.ops.grpo.norm_linear(*(None if tensor is None else tensor.detach() for tensor in tensors), eps, impl)


@torch.library.custom_op("grpo::norm_linear", mutates_args=())
def _norm_linear(
    x: Tensor, squares: Tensor, norm_weight: Tensor, weight: Tensor, up_weight: Tensor | None, eps: float, impl: str
) -> Tensor:
    others = {} if up_weight is None else {"up_weight": up_weight}
    if use_triton(
        impl,
        op="norm_linear",
        device=x.device,
        obstacle=_obstacle(x=x, norm=norm_weight[None], weight=weight, **others),
    ):
        from grpo.kernels.triton_few_rows import launch_norm_linear

        with torch.cuda.device_of(x):
            return launch_norm_linear(x, squares, norm_weight, weight, up_weight, eps)
    dtype = accumulation_dtype(x)
    mean = squares.to(dtype).sum(1, keepdim=True) / x.shape[1]
    normed = (x.to(dtype) * torch.rsqrt(mean + eps)).type_as(x) * norm_weight
    product = F.linear(normed, weight)
    return product if up_weight is None else F.silu(product) * F.linear(normed, up_weight)


@_norm_linear.register_fake
def _(x, squares, norm_weight, weight, *_):
    return x.new_empty(len(x), len(weight))


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(s, squares) of s = residual + x @ weight.T, all [N, D]; squares [N, S] fp32 are sums over 16 columns of s.

    `x` is [N, K], `weight` [D, K]. The product and s are rounded to the dtype. No gradient flows through. Raises
    ValueError for wrong shapes.
    """
    if x.ndim != 2 or residual.shape != (len(x), len(weight)) or weight.shape[1:] != x.shape[1:]:
        found = [*x.shape], [*weight.shape], [*residual.shape]
        raise ValueError(f"x, weight and residual must be [N, K], [D, K] and [N, D], not {found}")
    return torch.ops.grpo.linear_add(x.detach(), weight.detach(), residual.detach(), impl)


@torch.library.custom_op("grpo::linear_add", mutates_args=())
def _linear_add(x: Tensor, weight: Tensor, residual: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    obstacle = _obstacle(x=x, weight=weight, residual=residual)
    if use_triton(impl, op="linear_add", device=x.device, obstacle=obstacle):
        from grpo.kernels.triton_few_rows import launch_linear_add

        with torch.cuda.device_of(x):
            return launch_linear_add(x, weight, residual, SQUARES)
    total = residual + F.linear(x, weight)
    return total, sums_of_squares(total)


@_linear_add.register_fake
def _(x, weight, residual, impl):
    columns = -(-residual.shape[1] // SQUARES)
    return torch.empty_like(residual), residual.new_empty(len(x), columns, dtype=accumulation_dtype(x))


def sums_of_squares(x: Tensor) -> Tensor:
    """[N, D] -> [N, ceil(D / 16)], fp32 or, of fp64, fp64."""
    squares = x.to(accumulation_dtype(x)).square()
    if x.shape[1] % SQUARES:
        squares = F.pad(squares, (0, -x.shape[1] % SQUARES))
    return squares.unflatten(1, (-1, SQUARES)).sum(2)


def _obstacle(**matrices: Tensor) -> str | None:
    """Why the kernels cannot take these; None if they can."""
    if len({matrix.dtype for matrix in matrices.values()}) > 1:
        return f"{', '.join(matrices)} have several dtypes"
    return row_obstacle(**matrices)
