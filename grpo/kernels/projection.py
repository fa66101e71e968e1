"""Logits of a few rows, with the accumulator's precision."""

import torch
from torch import Tensor


@torch.no_grad()
def project_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, D] @ weight.T [D, V] -> logits [N, V] fp32, without gradient.

    bf16 logits of size 8 to 16 are off by up to 0.03, which would go straight into log-probs; here a product of
    half-precision numbers keeps the fp32 of its accumulator. Use it for the rows that are sampled now, in chunks;
    log-probs under a gradient come from `linear_token_log_probs`.
    """
    if hidden.dtype == weight.dtype == torch.float32:
        return hidden @ weight.t()
    if hidden.is_cuda and hidden.dtype == weight.dtype:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()
