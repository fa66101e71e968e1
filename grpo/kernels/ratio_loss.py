"""The clipped-ratio policy loss: loss, gradient and every metric's sum in one pass over the tokens.

Per token, with A the advantage, r = exp(log p - log p_old) and c = clip(r, 1 - clip_low, 1 + clip_high):

    "clip"   -min(A r, A c)                     Schulman et al., arXiv 1707.06347; clip-higher: DAPO, arXiv 2503.14476
    "cispo"  -stop_gradient(c) A log p          MiniMax-M1, arXiv 2506.13585

plus kl_coef times an estimator of KL(policy || reference), with d = log p_ref - log p (Schulman, "Approximating KL
divergence", 2020): k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1. Both log-ratios are clamped to +-20 before `exp`; beyond
that the exponential is constant and has no gradient.
"""

import torch
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype, use_triton

SURROGATES = ("clip", "cispo")
KL_ESTIMATORS = ("none", "k1", "k2", "k3")
LOG_RATIO_LIMIT = 20.0
METRICS = (
    "policy_loss",
    "kl_loss",
    "tokens",
    "ratio",
    "ratio_squared",
    "kl_old",
    "kl_ref",
    "clipped_low",
    "clipped_high",
    "outside",
)


def clipped_ratio_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    ref_log_probs: Tensor | None = None,
    kl: str = "none",
    kl_coef: float = 0.0,
    surrogate: str = "clip",
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the per-token losses above, and the sums that its metrics are made of.

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
    loss, sums, _ = torch.ops.grpo.clipped_ratio_loss(
        log_probs,
        old_log_probs.detach(),
        advantages.detach(),
        weights.detach(),
        None if ref_log_probs is None else ref_log_probs.detach(),
        clip_low,
        clip_high,
        "k3" if kl == "none" else kl,
        0.0 if kl == "none" else kl_coef,
        surrogate,
        impl,
    )
    return loss, dict(zip(METRICS, sums.detach().unbind(), strict=True))


@torch.library.custom_op("grpo::clipped_ratio_loss", mutates_args=())
def _forward(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_log_probs: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl: str,
    kl_coef: float,
    surrogate: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the sums of `METRICS`, and d loss / d log_probs [R, M, T]."""
    arguments = (log_probs, old_log_probs, advantages, weights, ref_log_probs, clip_low, clip_high)
    if use_triton(impl, op="clipped_ratio_loss", device=log_probs.device, obstacle=_obstacle(*arguments[:5])):
        from grpo.kernels.triton_ratio_loss import launch

        with torch.cuda.device_of(log_probs):
            return launch(*arguments, kl, kl_coef, surrogate)
    return _reference(*arguments, kl, kl_coef, surrogate)


@_forward.register_fake
def _(log_probs, old_log_probs, advantages, weights, ref_log_probs, clip_low, clip_high, kl, kl_coef, surrogate, impl):
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


def _reference(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_log_probs: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl: str,
    kl_coef: float,
    surrogate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(log_probs)
    gradient = torch.empty_like(log_probs, dtype=dtype)
    counted = weights != 0
    weights = weights.to(dtype)
    # What a token left out holds must not reach the sums, not even as NaN times 0.
    log_probs, old_log_probs = (x.to(dtype).where(counted, 0) for x in (log_probs, old_log_probs))
    advantages = advantages.to(dtype)[..., None].where(counted, 0)

    log_ratio, ratio, inside = _clamped_exp(log_probs - old_log_probs)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    if surrogate == "clip":
        clipped_low, clipped_high = below & (advantages < 0), above & (advantages > 0)
        policy = -torch.minimum(advantages * ratio, advantages * bounded)
        d_policy = -advantages * ratio * (inside & ~clipped_low & ~clipped_high)
    else:
        clipped_low, clipped_high = below, above
        policy = -bounded * advantages * log_probs
        d_policy = -bounded * advantages

    if ref_log_probs is None:
        divergence = d_divergence = torch.zeros_like(ratio)
    else:
        divergence, d_divergence = _kl_estimate(ref_log_probs.to(dtype).where(counted, 0) - log_probs, kl)

    policy_loss, kl_loss = (weights * policy).sum(), kl_coef * (weights * divergence).sum()
    per_token = (
        counted,
        ratio * counted,
        (ratio * ratio) * counted,
        (ratio - 1 - log_ratio),
        divergence,
        clipped_low,
        clipped_high,
        below | above,
    )
    sums = torch.stack([policy_loss, kl_loss, *(x.sum(dtype=dtype) for x in per_token)])
    torch.mul(weights, d_policy + kl_coef * d_divergence, out=gradient)
    return policy_loss + kl_loss, sums, gradient


def _clamped_exp(exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exponent clamped, its exponential, and where the clamp changes nothing."""
    clamped = exponent.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return clamped, clamped.exp(), clamped == exponent


def _kl_estimate(difference: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    """Estimate of KL(policy || reference) from log p_ref - log p, and its derivative with respect to log p."""
    if kl == "k1":
        return -difference, torch.ones_like(difference)
    if kl == "k2":
        return difference.square() / 2, -difference
    _, exponential, inside = _clamped_exp(difference)
    return exponential - difference - 1, 1 - exponential * inside


def _obstacle(*tensors: Tensor | None) -> str | None:
    if {tensor.dtype for tensor in tensors if tensor is not None} != {torch.float32}:
        return "not every input is fp32"
    return "2^31 tokens or more" if tensors[0].numel() >= 1 << 31 else None
