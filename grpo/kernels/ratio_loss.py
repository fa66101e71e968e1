"""The clipped-ratio policy loss: loss, gradient and every metric's sum in one pass over the tokens."""

import torch
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype, use_triton
from grpo.kernels.ratio_reference import KL_ESTIMATORS, METRICS, SURROGATES, ratio_loss


def clipped_ratio_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, weights: Tensor, clip_low: float, clip_high: float,
    ref_log_probs: Tensor | None = None, kl: str = "none", kl_coef: float = 0.0, surrogate: str = "clip",
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The weighted sum of the per-token losses of `ratio_reference.py`, and the sums that its metrics are made of.

    `log_probs`, `old_log_probs`, `ref_log_probs` and `weights` are [R, M, T], `advantages` [R, M]; all but `log_probs`
    are constants. `weights` holds the normalisation, so the same op serves a mean over sequences or over tokens; a
    token of weight 0 is left out of everything, whatever its other entries. Returns (loss, metrics), 0-dim fp32:

    policy_loss, kl_loss: weighted sums; their sum is the loss
    tokens: number of tokens of weight other than 0; the rest are sums over these, unweighted
    ratio, ratio_squared: of r
    kl_old: k3 estimate of KL(old policy || policy), r - 1 - log r
    kl_ref: the chosen estimator of KL(policy || reference), k3 where `kl` is "none"; 0 without `ref_log_probs`
    clipped_low, clipped_high: r below or above its bound on the side where the bound stops the gradient: A < 0 or A > 0
        ("clip"), any A ("cispo")
    outside: r beyond either bound

    Raises ValueError for shapes or names that do not fit.
    """
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate is {surrogate!r}; it must be one of {', '.join(SURROGATES)}")
    if kl not in KL_ESTIMATORS:
        raise ValueError(f"kl is {kl!r}; it must be one of {', '.join(KL_ESTIMATORS)}")
    if kl != "none" and ref_log_probs is None:
        raise ValueError(f"kl is {kl!r} but ref_log_probs is None")
    shape = log_probs.shape
    if len(shape) != 3 or advantages.shape != shape[:2]:
        raise ValueError(f"expected log_probs [R, M, T] and advantages [R, M], not {shape} and {advantages.shape}")
    for name, tensor in {"old_log_probs": old_log_probs, "weights": weights, "ref_log_probs": ref_log_probs}.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; log_probs is {list(shape)}")
    constants = [x if x is None else x.detach() for x in (old_log_probs, advantages, weights, ref_log_probs)]
    if kl == "none":  # a reference is then measured only
        kl, kl_coef = "k3", 0.0
    loss, sums, _ = torch.ops.grpo.clipped_ratio_loss(
        log_probs, *constants, clip_low, clip_high, kl, kl_coef, surrogate, impl
    )
    return loss, dict(zip(METRICS, sums.detach().unbind(), strict=True))


@torch.library.custom_op("grpo::clipped_ratio_loss", mutates_args=())
def _forward(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, ref_log_probs: Tensor | None,
    clip_low: float, clip_high: float, kl: str, kl_coef: float, surrogate: str, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the sums of `METRICS`, and d loss / d log_probs [R, M, T]."""
    tensors = (log_probs, old_log_probs, advantages, weights, ref_log_probs)
    terms = (clip_low, clip_high, kl, kl_coef, surrogate)
    if use_triton(impl, op="clipped_ratio_loss", device=log_probs.device, obstacle=_obstacle(*tensors)):
        from grpo.kernels.triton_ratio_loss import launch

        with torch.cuda.device_of(log_probs):
            return launch(*tensors, *terms)
    return ratio_loss(*tensors, *terms)


@_forward.register_fake
def _(log_probs, *_):
    dtype = accumulation_dtype(log_probs)
    gradient = torch.empty_like(log_probs, dtype=dtype)
    return log_probs.new_empty((), dtype=dtype), log_probs.new_empty(len(METRICS), dtype=dtype), gradient


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_loss, grad_sums, grad_gradient):
    (gradient,) = ctx.saved_tensors
    grad_log_probs = None if grad_loss is None else (grad_loss * gradient).to(ctx.dtype)
    return grad_log_probs, *[None] * 10


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _obstacle(log_probs: Tensor, *others: Tensor | None) -> str | None:
    if {tensor.dtype for tensor in (log_probs, *others) if tensor is not None} != {torch.float32}:
        return "not every input is fp32"
    return "2^31 tokens or more" if log_probs.numel() >= 1 << 31 else None
