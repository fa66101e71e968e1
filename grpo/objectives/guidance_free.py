"""Losses on real images after which a generator needs no guidance: contrastive alignment and guidance-free training."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo.kernels import linear_token_log_probs


def contrastive_alignment(
    positive: Tensor, negative: Tensor, *, same_condition: Tensor, beta: float, negative_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Condition contrastive alignment (CCA), Chen et al. 2024, arXiv 2410.09347.

    With r+ and r- the log-ratios log p(x | c) - log p_ref(x | c) of a whole image under its own condition and under
    another's, and s the logistic function, the loss of an image is

        (-log s(beta r+) - w log s(-beta r-)) / max(w, 1),    w = negative_weight (lambda).

    An image whose other condition is the same, or that has none in both, is no negative: its second term is
    -log s(beta r-), of weight 1. So the unconditional distribution stays that of the data. This is what the published
    code does, and the division, by which lambda leaves the learning rate as it is.

    Args:
        positive, negative: r+ and r-, [B].
        same_condition: [B] bool.

    Returns:
        The mean loss over the B images, and means of `log_ratio` (r+), `other_log_ratio` (r-) and `accuracy`, the share
        of images with r+ > r-.
    """
    sign = torch.where(same_condition, 1.0, -1.0).to(negative)
    weight = torch.where(same_condition, 1.0, negative_weight).to(negative)
    losses = -logsigmoid(beta * positive) - weight * logsigmoid(sign * beta * negative)
    accuracy = (positive > negative).to(positive).mean()
    means = {"log_ratio": positive.mean(), "other_log_ratio": negative.mean(), "accuracy": accuracy}
    return losses.mean() / max(negative_weight, 1.0), means


def guidance_free_log_probs(
    conditional: Tensor, unconditional: Tensor, weight: Tensor, tokens: Tensor, *, beta: float, impl: str = "auto"
) -> Tensor:
    """Log-probs of guidance-free training (GFT), Chen et al. 2025, arXiv 2501.15420, with a fixed beta.

    log softmax(beta W h_c + (1 - beta) stop_gradient(W h_u)) at `tokens`. Its likelihood is that of the data when the
    mixture is what next-token training finds; the conditional logits then are those of guidance 1 / beta.

    Args:
        conditional, unconditional: final hidden states h_c and h_u, [N, D]; the latter get no gradient.
        weight: W, [V, D], which gets one from the conditional part alone.
        tokens: [N, M] int64.

    Returns:
        [N, M] fp32.
    """
    # one projection of both parts side by side, so that logits exist in chunks only
    hidden = torch.cat([beta * conditional, (1 - beta) * unconditional.detach()], dim=1)
    return linear_token_log_probs(hidden, torch.cat([weight, weight.detach()], dim=1), tokens, impl=impl)
